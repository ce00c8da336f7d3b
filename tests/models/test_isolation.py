"""What training takes for granted of a model is found out at the start."""

import multiprocessing
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_alignment.errors import ConfigError
from lit_alignment.models.attention import document_attention
from lit_alignment.models.head import _shaped
from lit_alignment.models.isolation import check_isolation
from lit_alignment.models.loading import BackboneConfig, load_network, load_tokenizer
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.sft import SFTModule
from tests.helpers import DECODER_SIZE, ROOT, chats, sft_data, sft_module, trainer
from tests.helpers.ranks import run_on_ranks

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
BART = {"d_model": 64, "decoder_layers": 1, "encoder_layers": 1, "decoder_attention_heads": 4, "vocab_size": 300}


@pytest.fixture
def saved(tmp_path):
    """Makes a folder with a configuration and a tokenizer."""

    def make(kind, **settings):
        sizes = {name: value for name, value in DECODER_SIZE.items() if kind != "falcon" or name != "head_dim"}
        config = AutoConfig.for_model(kind, **(sizes | SPECIAL | settings))
        config.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(tmp_path)
        return BackboneConfig(str(tmp_path), weights="random")

    return make


def load(backbone, packing, **settings):
    torch.manual_seed(0)
    return load_network(backbone, load_tokenizer(backbone, TokensConfig())[0], packing=packing, **settings)


@pytest.mark.parametrize("kind", ["stablelm", "nemotron"])
def test_layers_that_do_not_hand_on_where_documents_begin_are_noticed(saved, kind):
    backbone = saved(kind)
    with pytest.raises(ConfigError, match=r"documents of a packed row are not kept apart.*Set data's packing: false"):
        check_isolation(load(backbone, True), packing=True)
    check_isolation(load(backbone, False), packing=False)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures_that_keep_documents_apart_pass(saved, kind, shared, dtype):
    backbone = saved(kind, **(EXPERTS if kind == "qwen3_moe" else {}))
    network = load(backbone, True, shared_prompts=shared).to(getattr(torch, dtype))
    check_isolation(network, packing=True, shared_prompts=shared)
    assert network.training


@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_compiled_model_passes(saved):
    network = load(replace(saved("llama", num_hidden_layers=1), compile=True), True)
    check_isolation(network, packing=True)


def test_response_that_does_not_see_its_prompt_is_noticed(saved, monkeypatch):
    """Parents are lost on the way to the attention."""
    network = load(saved("llama"), True, shared_prompts=True)

    def forget(*arguments, document_parents=None, **rest):
        return document_attention(*arguments, **rest)

    monkeypatch.setitem(_functions(), "document_sdpa", forget)
    check_isolation(network, packing=True)
    with pytest.raises(ConfigError, match="not kept apart"):
        check_isolation(network, packing=True, shared_prompts=True)


def _functions():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS._global_mapping


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("bert", {}, "BertLMHeadModel: an encoder .config.is_decoder is false., no causal language model"),
        ("bart", BART, "bart: an encoder with a decoder, which is no language model by itself"),
    ],
)
def test_encoders_are_refused(saved, kind, settings, words):
    with pytest.raises(ConfigError, match=words):
        check_isolation(load(saved(kind, **settings), False), packing=False)


def test_architecture_that_counts_positions_otherwise_is_refused(saved):
    with pytest.raises(ConfigError, match="it does not count positions from 0"):
        check_isolation(load(saved("roberta", is_decoder=True), False), packing=False)


@pytest.mark.parametrize("kind", ["falcon", "gemma2", "gpt_oss", "mpt", "bloom", "gpt_neo"])
def test_attention_that_sdpa_does_not_compute_is_eager_without_packing(saved, kind):
    sizes = {
        "gpt_oss": {"num_local_experts": 4, "layer_types": ["full_attention", "sliding_attention"]},
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
        "bloom": {"n_head": 4, "n_layer": 2},
    }
    backbone = saved(kind, **sizes.get(kind, {}))
    with pytest.raises(ConfigError, match=r"Set data's packing: false, and backbone.attention to auto or eager"):
        load(backbone, True)
    network = load(backbone, False)
    assert network.config._attn_implementation == "eager"
    check_isolation(network, packing=False)


@pytest.mark.parametrize("packing", [True, False])
def test_conversations_longer_than_learned_positions_are_refused_at_the_start(saved, tmp_path, packing):
    module = SFTModule(saved("gpt2"))
    with pytest.raises(ConfigError, match=r"has 256 learned positions, and data.encoding.max_length is 512"):
        trainer(tmp_path).fit(module, sft_data(module, chats(2), packing=packing))


def test_leaking_model_does_not_train(saved, tmp_path):
    module = SFTModule(saved("stablelm"))
    with pytest.raises(ConfigError, match="StableLmForCausalLM: the documents of a packed row are not kept apart"):
        trainer(tmp_path).fit(module, sft_data(module, chats(2)))
    module = SFTModule(saved("stablelm"))
    trainer(tmp_path, max_steps=1).fit(module, sft_data(module, chats(2), packing=False))


def test_soft_cap_of_the_logits_is_known_under_either_name(saved):
    """RecurrentGemma has a name of its own for it."""
    config = AutoConfig.for_model("llama", **DECODER_SIZE | SPECIAL)
    network = AutoModelForCausalLM.from_config(config)
    assert "logits_soft_cap" not in config.to_dict()
    config.logits_soft_cap = 5.0
    assert float(_shaped(network, torch.tensor([100.0]))) == pytest.approx(5.0)


def test_tokenizer_without_end_and_padding_pads_with_some_token(saved, tmp_path):
    backbone = saved("llama")
    tokenizer = AutoTokenizer.from_pretrained(backbone.path)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(backbone.path)
    module = SFTModule(backbone)
    assert module.tokenizer.eos_token is None and module.tokenizer.pad_token_id == 0
    data = sft_data(module, chats(4), packing=False, batch_size=4)
    trainer(tmp_path, max_steps=1).fit(module, data)


def fit_and_predict(folder):
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["tests.helpers"])  # once for all workers
    module = sft_module()
    data = sft_data(module, chats(4), chats(2), num_workers=1, packing=False, batch_size=2)
    run = trainer(folder)
    run.fit(module, data)
    run.predict(module, data)
    assert run.global_step == 2


@pytest.mark.slow
def test_workers_that_are_not_forked_get_the_loader(tmp_path):
    run_on_ranks(fit_and_predict, tmp_path, ranks=1)


def test_usual_model_is_looked_at_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("lit_alignment.modules.base.check_isolation", lambda *arguments: calls.append(arguments))
    module = sft_module()
    trainer(tmp_path, max_steps=3).fit(module, sft_data(module, chats(6), chats(2)))
    assert len(calls) == 1 and calls[0][1] is True
