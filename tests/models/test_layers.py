"""However decoder layers run, a training has the same numbers."""

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lit_alignment.data.batching.collate import collate_packed, filled
from lit_alignment.data.encoding.example import Example
from lit_alignment.errors import ConfigError
from lit_alignment.models import layers
from lit_alignment.models.head import base_model, hidden_states
from lit_alignment.models.layers import LayerConfig, decoder_layers, set_layers
from lit_alignment.models.loading import BackboneConfig, load_network, load_tokenizer
from lit_alignment.models.logprobs import row_inputs
from lit_alignment.models.tokens import TokensConfig
from tests.helpers import DECODER_SIZE, ROOT

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
ROWS = [[100, 156], [50, 60, 146], [256], [30] * 8 + [16], [255, 1]]  # documents of rows of one length
MODES = [
    {"checkpointing": "full"},
    {"checkpointing": "selective", "selective": 2},
    {"checkpointing": "selective"},
    {"checkpointing": "full", "offload": True},
]


def load(lora=False, path="configs/tiny", **settings):
    torch.manual_seed(0)
    backbone = BackboneConfig(str(path), weights="random", **settings)
    peft = LoraConfig(**LORA) if lora else None
    return load_network(backbone, load_tokenizer(backbone, TokensConfig())[0], peft=peft, packing=True)


def row(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    return collate_packed([Example(each, each, [1.0] * len(each)) for each in ids])


def gradients(network, batch, seed=0):
    network.zero_grad()
    torch.manual_seed(seed)  # of dropout
    hidden = hidden_states(network, **row_inputs(network, batch))
    (hidden.square().sum() / 1000).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", MODES, ids=["full", "every-second", "save-attention", "offload"])
def test_recomputed_layers_give_the_same_gradients_to_the_bit(mode, lora):
    plain, network = load(lora), load(lora)
    for model in (plain, network):
        base_model(model).config.attention_dropout = 0.3
        for layer in decoder_layers(base_model(model)):
            layer.self_attn.attention_dropout = 0.3
    set_layers(base_model(network), LayerConfig(**mode))
    batch = row([20, 30])
    assert_equal(gradients(network, batch), gradients(plain, batch))


@pytest.mark.parametrize(("mode", "expected"), zip(MODES, [(2, 2), (2, 1), (2, 2), (2, 2)], strict=True))
def test_layers_that_are_asked_for_are_computed_twice(mode, expected, monkeypatch):
    network = load()
    set_layers(network, LayerConfig(**mode))
    calls = []
    for index, layer in enumerate(decoder_layers(network)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    kept = []
    keep = layers._keep_attention
    monkeypatch.setattr(layers, "_keep_attention", lambda *a, **k: kept.append(keep(*a, **k).name) or keep(*a, **k))
    gradients(network, row([20, 30]))
    assert (calls.count(0), calls.count(1)) == expected
    documents = 2 * 2 if mode == {"checkpointing": "selective"} else 0  # in two layers
    assert kept.count("MUST_SAVE") == documents
    network.eval()
    gradients(network, row([20, 30]))
    assert len(calls) == sum(expected) + 2


def test_offload_sends_the_inputs_of_layers_to_the_host_and_nothing_else(monkeypatch):
    sent = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            super().__init__(lambda tensor: sent.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(layers, "save_on_cpu", Recording)
    network = load()
    set_layers(network, LayerConfig(checkpointing="full", offload=True))
    gradients(network, row([20, 30]))
    width = network.config.hidden_size
    assert [shape for shape in sent if shape != (0,)] == [(1, 50, width)] * 2


def test_copied_layer_runs_its_own_weights():
    network = load(gradient_checkpointing=True)
    twin = copy.deepcopy(network)
    before = gradients(network, row([20]))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal(gradients(network, row([20])), before)
    assert all(not bool(g.any()) for g in gradients(twin, row([20])).values())


def test_layers_under_a_cache_run_once_and_as_they_are():
    network = load(gradient_checkpointing="full")
    plain = load()
    ids = torch.arange(12)[None]
    found = network.generate(ids, max_new_tokens=4, do_sample=False)  # in training mode, with a cache
    assert torch.equal(found, plain.generate(ids, max_new_tokens=4, do_sample=False))


def test_booleans_of_earlier_configurations_keep_their_meaning():
    assert BackboneConfig("x", gradient_checkpointing=True).layers.checkpointing == "full"
    assert BackboneConfig("x", gradient_checkpointing=False).layers == BackboneConfig("x").layers == LayerConfig()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_checkpointing": "selective", "selective": 1}, "backbone.selective is 1; give save_attention, or 2"),
        (
            {"gradient_checkpointing": "selective", "activation_offload": True},
            "activation_offload: with gradient_checkpointing: selective all that",
        ),
        ({"activation_offload": True}, "activation_offload: with gradient_checkpointing: none all that a layer comput"),
        (
            {"gradient_checkpointing": True, "activation_offload": True},
            "backbone.activation_offload: on a CPU activations are in the host's memory already",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        load(**settings)


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"compile": True}])
def test_prefix_tuning_is_neither_recomputed_nor_compiled(settings):
    backbone = BackboneConfig("configs/tiny", weights="random", **settings)
    tokenizer = load_tokenizer(backbone, TokensConfig())[0]
    peft = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"prefix tuning hands keys and values.*backbone.compile: false"):
        load_network(backbone, tokenizer, peft=peft)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text", "opt", "gpt_neox", "falcon"])
def test_layers_of_many_architectures_are_found(kind, tmp_path):
    sizes = {name: value for name, value in DECODER_SIZE.items() if kind != "falcon" or name != "head_dim"}
    AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(tmp_path)
    backbone = BackboneConfig(str(tmp_path), weights="random", gradient_checkpointing="full")
    network = load_network(backbone, load_tokenizer(backbone, TokensConfig())[0])
    assert len(decoder_layers(network)) == 2
    hidden = hidden_states(network, input_ids=torch.arange(8)[None])
    hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder_layers(network)[0].parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(
    ("lora", "mode"),
    [
        (False, {}),
        (True, {"gradient_checkpointing": "full"}),
        (True, {"gradient_checkpointing": "selective"}),
    ],
    ids=["plain", "lora-full", "lora-save-attention"],
)
def test_compiled_layers_give_the_same_gradients_and_are_compiled_once(lora, mode):
    """A row of other documents, or of fewer, which padding fills up, needs no program of its own."""
    plain, network = load(lora), load(lora, compile=True, **mode)
    programs = []
    for number, lengths in enumerate([*ROWS, [90, 40]]):
        batch = row(lengths, number)
        full = filled(batch, 256, 0)
        assert full.input_ids.shape == (1, 256)
        hidden = [hidden_states(each, **row_inputs(each, b)) for each, b in ((plain, batch), (network, full))]
        torch.testing.assert_close(hidden[1][:, : sum(lengths)], hidden[0], rtol=1e-5, atol=1e-5)
        assert_equal(gradients(network, full), gradients(plain, full), 1e-5)
        programs.append(counters["stats"]["unique_graphs"])
    assert programs[0] > 0 and set(programs) == {programs[0]}
    network.eval()
    with torch.no_grad():
        for number, lengths in enumerate(ROWS):
            hidden_states(network, **row_inputs(network, row(lengths, number)))
    assert counters["stats"]["unique_graphs"] <= 2 * programs[0]  # each part once more: without gradients


@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_padded_batches_of_any_shape_are_compiled_twice_at_most():
    network = load(compile=True)
    programs = []
    for rows, width in ((4, 16), (4, 32), (3, 64), (2, 40)):
        mask = torch.ones(rows, width, dtype=torch.long)
        mask[0, width // 2 :] = 0
        hidden_states(network, input_ids=torch.zeros_like(mask), attention_mask=mask).sum().backward()
        programs.append(counters["stats"]["unique_graphs"])
    assert programs[3] == programs[2] <= 3 * programs[0]  # for any width, and for any number of rows


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_gives_the_same_gradients():
    """With its own kernels, which round otherwise."""
    plain, network = load(), load(compile=True)
    assert_equal(gradients(network, row([40, 24])), gradients(plain, row([40, 24])), 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "mixtral"])
def test_layers_are_found_wherever_an_architecture_keeps_them(name):
    config = AutoConfig.for_model(name, **(DECODER_SIZE | {"num_hidden_layers": 3}))
    found = layers.layer_list(AutoModel.from_config(config))
    assert len(found) == 3 and len({type(layer) for layer in found}) == 1
    assert "expert" not in type(found[0]).__name__.lower()


def test_a_model_without_a_list_of_layers_is_refused_where_they_are_needed():
    model = AutoModel.from_config(AutoConfig.for_model("llama", **DECODER_SIZE))
    model.layers = torch.nn.ModuleDict({str(number): layer for number, layer in enumerate(model.layers)})
    assert layers.layer_list(model) == []
    with pytest.raises(ConfigError, match="LlamaModel has no list of decoder layers"):
        decoder_layers(model)
