"""Every kind of adapter trains, saves, resumes, exports and answers, with the numbers of its own training."""

import json
from dataclasses import replace

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PromptTuningConfig,
    PromptTuningInit,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_alignment import Export, SFTModule
from lit_alignment.checkpoints.restore import trained_names
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.adapters import AdapterConfig, merged_state, why_merge
from lit_alignment.models.head import head_loss, hidden_states, token_logps
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.stop_rule import StopRule
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from tests.helpers import base_model_folder, generate, weights
from tests.helpers.adapters import ADAPTERS, LORA, PROMPTS, WEIGHTS, fit, logits, module_with

EACH = pytest.mark.parametrize("name", ADAPTERS)


@pytest.fixture
def base(tmp_path):
    return base_model_folder(tmp_path / "base")


@EACH
def test_adapter_trains_and_leaves_the_base_alone(name, base, tmp_path):
    module = module_with(base, ADAPTERS[name])
    module.load_model()
    frozen = {n: p.detach().clone() for n, p in module.network.named_parameters() if not p.requires_grad}
    start = weights(module)
    fit(tmp_path, module)
    assert any(not torch.equal(value, start[key]) for key, value in weights(module).items())
    after = dict(module.network.named_parameters())
    assert all(torch.equal(value, after[key]) for key, value in frozen.items())


@EACH
@pytest.mark.slow
def test_resumed_adapter_equals_an_uninterrupted_run(name, base, tmp_path):
    whole = module_with(base, ADAPTERS[name])
    fit(tmp_path / "whole", whole, epochs=2)
    last = fit(tmp_path / "parts", module_with(base, ADAPTERS[name]), epochs=1)
    resumed = module_with(base, ADAPTERS[name])
    fit(tmp_path / "parts", resumed, epochs=2, resume=last)
    expected = weights(whole)
    for key, value in weights(resumed).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@EACH
def test_exported_adapter_loads_with_equal_logits(name, base, tmp_path):
    module = module_with(base, ADAPTERS[name])
    fit(tmp_path, module, callbacks=[Export(form="adapter")])
    folder = tmp_path / "ckpt/export"
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), logits(module.network), rtol=1e-4, atol=1e-4)
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert "lit_alignment" in (folder / "README.md").read_text()  # and not the empty form of peft


@pytest.mark.parametrize("name", WEIGHTS)
def test_merged_weights_give_the_logits_of_the_adapter(name, base, tmp_path):
    module = module_with(base, WEIGHTS[name])
    fit(tmp_path, module)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_state_dict(merged_state(module.network), strict=True)
    torch.testing.assert_close(logits(plain), logits(module.network), rtol=1e-4, atol=1e-4)


def test_merging_rounds_once(base, tmp_path):
    """The merged bf16 weight is the rounded fp32 sum, not a sum in bf16."""
    module = module_with(base, WEIGHTS["lora"])
    module.backbone = replace(module.backbone, dtype="bfloat16")
    network = module.load_model()
    layer = network.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    expected = (layer.base_layer.weight.float() + b @ a * layer.scaling["default"]).bfloat16()
    assert torch.equal(merged_state(network)["model.layers.0.self_attn.q_proj.weight"], expected)


@pytest.mark.parametrize("name", PROMPTS)
def test_vectors_before_the_tokens_are_refused_where_they_cannot_work(name, base, tmp_path):
    module = module_with(base, PROMPTS[name])
    with pytest.raises(ConfigError, match="packing: false"):
        fit(tmp_path, module, packing=True)
    with pytest.raises(ConfigError, match="cannot be merged into weights. Export the adapter"):
        merged_state(module_with(base, PROMPTS[name]).load_model())


@EACH
def test_answers_are_those_of_a_slow_loop_with_the_training_forward(name, base):
    """Batched and padded, against one token at a time through the forward pass that training uses."""
    module = module_with(base, ADAPTERS[name])
    network = module.load_model().eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17]]
    settings = DecodingConfig(max_new_tokens=6, skip_special_tokens=False, logprobs=True)
    answers = generate(network, module.tokenizer, prompts, settings, StopRule([], []))
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids, logprob = list(prompt), 0.0
        for _ in range(6):
            mask = torch.ones(1, len(ids))
            with torch.no_grad():
                scores = network(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0, -1]
            ids.append(int(scores.argmax()))
            logprob += float(scores.log_softmax(-1).max())
        assert answer.text == module.tokenizer.decode(ids[len(prompt) :])
        assert answer.logp == pytest.approx(logprob, abs=1e-3)


@pytest.mark.parametrize("name", PROMPTS)
def test_beams_and_samples_work_with_vectors_before_the_tokens(name, base):
    module = module_with(base, PROMPTS[name])
    network = module.load_model()
    for settings in (
        DecodingConfig(max_new_tokens=4, num_beams=3, num_return_sequences=2),
        DecodingConfig(max_new_tokens=4, temperature=1.0, num_return_sequences=3),
    ):
        answers = generate(network, module.tokenizer, [[5, 6], [7, 8, 9]], settings, StopRule([], []))
        assert [len(found) for found in answers] == [settings.num_return_sequences] * 2


def test_prompt_tuning_begins_with_the_rows_of_its_text(base):
    text = "route the request"
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text)["input_ids"]
    peft = PromptTuningConfig(
        num_virtual_tokens=len(ids),
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    network = module_with(base, peft).load_model()
    rows = network.get_base_model().get_input_embeddings().weight[ids]
    assert torch.equal(network.prompt_encoder["default"].embedding.weight, rows)


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_existing_adapter_goes_on_or_stays_frozen(name, base, tmp_path):
    first = module_with(base, ADAPTERS[name])
    fit(tmp_path / "first", first, callbacks=[Export(form="adapter")])
    folder = str(tmp_path / "first/ckpt/export")
    frozen = module_with(base, adapter=AdapterConfig(folder))
    assert torch.equal(logits(frozen.load_model()), logits(first.network))
    with pytest.raises(ConfigError, match="set model.peft, or model.adapter.trainable"):
        fit(tmp_path / "frozen", module_with(base, adapter=AdapterConfig(folder)), packing=False)
    going_on = module_with(base, adapter=AdapterConfig(folder, trainable=True))
    if name == "prompt":
        with pytest.raises(ConfigError, match="cannot train on. Resume from the checkpoint"):
            going_on.load_model()
        return
    last = fit(tmp_path / "on", going_on, epochs=1, packing=False)
    assert not torch.equal(logits(going_on.network), logits(first.network))
    saved = torch.load(last, weights_only=True)
    assert set(saved["state_dict"]) == trained_names(going_on)
    assert saved["lit_alignment"]["adapter"] == {"path": folder, "trainable": True}


def test_new_and_existing_adapters_together_are_refused(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"not both.*lit-alignment merge"):
        module_with(base, ADAPTERS["lora"], adapter=AdapterConfig(str(tmp_path)))


def test_folder_without_an_adapter_is_refused(base):
    with pytest.raises(ConfigError, match="no adapter_config.json in this folder"):
        AdapterConfig(base)


def test_adapter_of_another_vocabulary_names_the_tokens(base, tmp_path):
    tokens = TokensConfig(new={"<tool>": NewTokenConfig("mean"), "<end>": NewTokenConfig("mean")})
    module = module_with(base, ADAPTERS["lora"], tokens=tokens)
    fit(tmp_path, module, epochs=1, callbacks=[Export(form="adapter")])
    folder = str(tmp_path / "ckpt/export")
    with pytest.raises(CheckpointError, match=r"it lacks '<tool>', '<end>'. Set model.backbone.tokenizer to"):
        module_with(base, adapter=AdapterConfig(folder)).load_model()
    other = module_with(base, adapter=AdapterConfig(folder), tokens=TokensConfig(new={"<end>": NewTokenConfig("mean")}))
    with pytest.raises(CheckpointError, match=r"it lacks '<tool>'; '<end>' stand at other ids"):
        other.load_model()
    same = module_with(base, adapter=AdapterConfig(folder))
    same = SFTModule(BackboneConfig(base, tokenizer=folder), adapter=AdapterConfig(folder))
    assert torch.equal(logits(same.load_model()), logits(module.network))


def test_adapter_of_another_model_is_refused(base, tmp_path):
    module = module_with(base, ADAPTERS["lora"])
    fit(tmp_path, module, epochs=1, callbacks=[Export(form="adapter")])
    config = json.loads((tmp_path / "base/config.json").read_text()) | {"hidden_size": 32, "head_dim": 8}
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(base).save_pretrained(wide)
    narrow = SFTModule(
        BackboneConfig(str(wide), weights="random"), adapter=AdapterConfig(str(tmp_path / "ckpt/export"))
    )
    with pytest.raises(CheckpointError, match="does not fit the backbone"):
        narrow.load_model()


def test_what_needs_a_gpu_says_so(base):
    with pytest.raises(ConfigError, match=r"backbone\.liger needs a CUDA GPU"):
        SFTModule(BackboneConfig(base, liger=True)).load_model("cpu")


def test_quantised_weights_without_adapters_are_refused(base):
    with pytest.raises(ConfigError, match="quantised weights cannot train"):
        SFTModule(BackboneConfig(base, quantization="nf4")).load_model("cuda")


@pytest.mark.parametrize("kind", ["whole layer", "new rows"])
def test_adapters_switched_off_give_the_base_also_in_the_head(kind, base):
    """As KL to the base needs it: the head that the loss and the log-probabilities are taken from is off as well."""
    if kind == "whole layer":
        module = module_with(base, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    else:
        module = module_with(base, LoraConfig(**LORA), tokens=TokensConfig(new={"<a>": NewTokenConfig("mean")}))
    network = module.load_model().eval()
    ids = torch.arange(3, 40)[None]

    def found():
        hidden = hidden_states(network, input_ids=ids)[0, :-1]
        loss, _ = head_loss(network, hidden, ids[0, 1:], None)
        return float(loss), token_logps(network, hidden, ids[0, 1:])

    with torch.no_grad(), network.disable_adapter():
        before = found()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        changed = found()
        with network.disable_adapter():
            after = found()
    assert after[0] == before[0] and torch.equal(after[1], before[1])
    assert changed[0] != before[0] and after[0] == pytest.approx(-float(after[1].sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, ""),
        ({"use_dora": True}, "it uses DoRA"),
        ({"bias": "lora_only"}, "it trains biases"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "it holds whole layers"),
    ],
)
def test_what_servers_cannot_load_has_a_reason_to_be_merged(base, settings, reason):
    module = module_with(base, LoraConfig(**(LORA | settings)))
    assert why_merge(module.load_model()) == reason


def test_factors_in_half_precision_are_multiplied_in_float32(base):
    """The product of bf16 factors is not rounded before it meets the bf16 weight."""
    module = module_with(base, WEIGHTS["lora"])
    module.backbone = replace(module.backbone, dtype="bfloat16")
    network = module.load_model()
    layer = network.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == layer.base_layer.weight.dtype == torch.bfloat16
    expected = (layer.base_layer.weight.float() + b.float() @ a.float() * layer.scaling["default"]).bfloat16()
    assert torch.equal(merged_state(network)["model.layers.0.self_attn.q_proj.weight"], expected)
