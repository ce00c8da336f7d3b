"""Special and new tokens, on tied and untied models of several architectures."""

import copy

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)

from lit_alignment import Export, SFTModule
from lit_alignment.checkpoints.restore import trained_names
from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig, add_tokens, fit_vocabulary, vocabulary_difference
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import ROOT, base_model_folder, chats, sft_data, trainer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 768}
LLAMA_SIZES = SIZES | {"intermediate_size": 32, "num_key_value_heads": 1}
CONFIGS = {
    "llama-untied": LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=True),
    "llama-padded": LlamaConfig(**LLAMA_SIZES | {"vocab_size": 1024}, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**LLAMA_SIZES, tie_word_embeddings=False),
    "gemma": GemmaConfig(**LLAMA_SIZES, head_dim=8),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=32),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=768),
}
NEW = {
    "<copy>": NewTokenConfig("copy", "<|im_start|>"),
    "<best>": NewTokenConfig("text", "the order kitchen"),
    "<mean>": NewTokenConfig("mean"),
    "<drawn>": NewTokenConfig("normal"),
}


def tables(model):
    """The matrices that have a row a token."""
    found = [model.get_input_embeddings().weight]
    if not model.config.tie_word_embeddings:
        found.append(model.get_output_embeddings().weight)
    return found


def fitted(config, tokens, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # resizing changes it
    before = [table.detach().clone() for table in tables(model)]
    added = add_tokens(tokenizer, tokens)
    fit_vocabulary(model, tokenizer, added, tokens)
    return model, before, added


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_begin_as_asked_in_both_matrices(name, tokenizer):
    model, before, added = fitted(CONFIGS[name], TokensConfig(new=NEW), tokenizer)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    words = tokenizer("the order kitchen")["input_ids"]
    assert list(added) == list(NEW) and len(words) > 2
    for table, old in zip(tables(model), before, strict=True):
        assert table.shape[0] == max(len(tokenizer), len(old))
        known = old[:768]
        assert torch.equal(table[:768], known)
        assert torch.equal(table[added["<copy>"]], known[start])
        torch.testing.assert_close(table[added["<best>"]], known[words].mean(0))
        torch.testing.assert_close(table[added["<mean>"]], known.mean(0))


@pytest.mark.parametrize("name", ["llama-untied", "llama-tied"])
def test_tying_is_kept_and_other_tokens_answer_as_before(name, tokenizer):
    torch.manual_seed(0)
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        model, _, _ = fitted(CONFIGS[name], TokensConfig(new=NEW), tokenizer)
        found = model(input_ids=ids).logits
    assert torch.equal(found[..., :768], expected)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == CONFIGS[name].tie_word_embeddings and model.config.vocab_size == len(tokenizer)


def test_normal_rows_have_the_mean_and_covariance_of_all_rows(tokenizer):
    """4000 tokens drawn from the fit have its moments; each draw depends on its token's name alone."""
    tokens = TokensConfig(new={f"<n{i}>": NewTokenConfig("normal") for i in range(4000)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(torch.linspace(0.5, 2, 16)).add_(torch.linspace(-1, 1, 16))
    old = model.get_input_embeddings().weight.detach().clone()
    added = add_tokens(tokenizer, tokens)
    fit_vocabulary(model, tokenizer, added, tokens)
    drawn = model.get_input_embeddings().weight[768:].detach()
    torch.testing.assert_close(drawn.mean(0), old.mean(0), atol=4 * 0.04 / 4000**0.5, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), old.T.cov(), atol=0.1 * float(old.T.cov().max()), rtol=0)
    assert len({tuple(row.tolist()) for row in drawn[:50]}) == 50


def test_padded_vocabulary_is_a_multiple_and_its_rows_are_the_mean(tokenizer):
    model, before, _ = fitted(CONFIGS["llama-untied"], TokensConfig(new=NEW, pad_vocabulary_to=64), tokenizer)
    for table, old in zip(tables(model), before, strict=True):
        assert table.shape[0] == 832  # 768 + 4, rounded up
        torch.testing.assert_close(table[772:], old.mean(0).expand(60, -1))


def test_doing_it_twice_changes_nothing(tokenizer):
    model, _, added = fitted(CONFIGS["llama-untied"], TokensConfig(new=NEW), tokenizer)
    once = [table.detach().clone() for table in tables(model)]
    again = add_tokens(tokenizer, TokensConfig(new=NEW))
    fit_vocabulary(model, tokenizer, again, TokensConfig(new=NEW))
    assert added and not again
    assert all(torch.equal(a, b) for a, b in zip(once, tables(model), strict=True))


def test_special_tokens_are_set_where_missing_and_never_replaced(tokenizer):
    before = (tokenizer.eos_token, tokenizer.pad_token)
    tokenizer.sep_token = None
    added = add_tokens(tokenizer, TokensConfig(eos="<other>", sep="<sep>", pad="<other>"))
    assert before == (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", tokenizer.pad_token)
    assert tokenizer.sep_token == "<sep>" and list(added) == ["<sep>"]


def test_new_token_is_one_id_anywhere_in_a_text(tokenizer):
    added = add_tokens(tokenizer, TokensConfig(new={"<tool>": NewTokenConfig()}))
    ids = tokenizer("call<tool>now")["input_ids"]
    assert ids.count(added["<tool>"]) == 1 and tokenizer.decode(ids) == "call<tool>now"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "callnow"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (lambda: TokensConfig(new={"<x>": NewTokenConfig("copy")}), "init 'copy' needs 'of'"),
        (lambda: TokensConfig(new={"<x>": NewTokenConfig("mean", "y")}), "init 'mean' takes no 'of'"),
        (lambda: TokensConfig(new={"": NewTokenConfig()}), "holds an empty token"),
        (lambda: TokensConfig(pad_vocabulary_to=0), "pad_vocabulary_to is 0; use 1 or more"),
        (
            lambda: TokensConfig(new={"<x>": NewTokenConfig("copy", "<nowhere>")}),
            "'<nowhere>', is not in the vocabulary",
        ),
        (lambda: TokensConfig(new={"<x>": NewTokenConfig("text", "")}), "the text '' has no known token"),
    ],
)
def test_impossible_tokens_are_refused(tokens, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        fitted(CONFIGS["llama-untied"], tokens(), tokenizer)


def test_difference_of_vocabularies_names_tokens(tokenizer):
    other = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    assert vocabulary_difference(tokenizer, other) == ""
    add_tokens(other, TokensConfig(new={f"<{i}>": NewTokenConfig() for i in range(10)}))
    assert vocabulary_difference(tokenizer, other).startswith("it lacks '<0>', '<1>'")
    assert vocabulary_difference(tokenizer, other).endswith("and 2 more")
    add_tokens(tokenizer, TokensConfig(new={f"<{i}>": NewTokenConfig() for i in (1, 0, *range(2, 10))}))
    assert vocabulary_difference(tokenizer, other) == "'<0>', '<1>' stand at other ids"


# With adapters.


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    return base_model_folder(tmp_path / "base", tie_word_embeddings=request.param)


def lora_fit(base, folder, **export):
    seed_everything(0, verbose=False)
    records = chats(6)
    for entry in records:
        entry["messages"][-1]["content"] += "<best>"
    module = SFTModule(
        BackboneConfig(base),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        tokens=TokensConfig(new=NEW),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0),
    )
    saver = ModelCheckpoint(folder / "ckpt")
    trainer(folder, callbacks=[Export(**export), saver], enable_checkpointing=True, max_epochs=2).fit(
        module, sft_data(module, records)
    )
    return module, saver.best_model_path


def rows_of(model, ids):
    """Rows of the new tokens as the forward pass uses them, in both matrices."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = torch.eye(base.config.hidden_size)
    with torch.no_grad():
        return base.get_input_embeddings()(torch.tensor(ids)), base.get_output_embeddings()(hidden).T[ids]


def test_only_new_rows_train_beside_lora(base, tmp_path):
    module, _ = lora_fit(base, tmp_path)
    fresh = SFTModule(BackboneConfig(base), module.peft_config, tokens=TokensConfig(new=NEW))
    start = rows_of(fresh.load_model(), list(range(len(module.tokenizer))))
    ids = sorted(module.added_tokens.values())
    for before, after in zip(start, rows_of(module.network, list(range(len(module.tokenizer)))), strict=True):
        assert torch.equal(before[:768], after[:768])
        assert not torch.equal(before[module.added_tokens["<best>"]], after[module.added_tokens["<best>"]])
    trained = [n for n in trained_names(module) if "lora_" not in n]
    assert trained and all("trainable_tokens_delta" in name for name in trained)
    assert sum(p.numel() for n, p in module.named_parameters() if n in trained) == len(ids) * 64 * (
        1 if module.network.get_base_model().config.tie_word_embeddings else 2
    )


def test_new_rows_are_equal_to_the_bit_after_saving_and_loading(base, tmp_path):
    module, checkpoint = lora_fit(base, tmp_path, form="adapter")
    ids = sorted(module.added_tokens.values())
    trained = rows_of(module.network, ids)
    again = SFTModule(BackboneConfig(base), module.peft_config, tokens=TokensConfig(new=NEW))
    again.load_model()
    again.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=False)
    exported = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ckpt/export")
    for other in (again.network, exported):
        assert all(torch.equal(a, b) for a, b in zip(trained, rows_of(other, ids), strict=True))


def test_export_merges_new_rows_by_itself_and_says_so(base, tmp_path, caplog):
    module, _ = lora_fit(base, tmp_path)
    folder = tmp_path / "ckpt/export"
    assert not (folder / "adapter_config.json").exists()
    assert "merged into the weights, since it holds rows of new tokens" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = sorted(module.added_tokens.values())
    assert all(torch.equal(a, b) for a, b in zip(rows_of(module.network, ids), rows_of(plain, ids), strict=True))
    tokens = torch.tensor([[5, 6, *ids, 7]])
    with torch.no_grad():
        module.network.eval()
        torch.testing.assert_close(
            plain(input_ids=tokens).logits, module.network(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
        )
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<best>") == module.added_tokens["<best>"]


def test_full_training_with_new_tokens_exports_all_rows(base, tmp_path):
    module = SFTModule(BackboneConfig(base), tokens=TokensConfig(new=NEW, pad_vocabulary_to=64))
    saver = ModelCheckpoint(tmp_path / "ckpt")
    trainer(tmp_path, callbacks=[Export(), saver], enable_checkpointing=True).fit(module, sft_data(module, chats(4)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt/export")
    assert loaded.config.vocab_size == 832
    ids = list(range(len(module.tokenizer)))
    assert all(torch.equal(a, b) for a, b in zip(rows_of(module.network, ids), rows_of(loaded, ids), strict=True))
