"""PyTorch's variable-length kernel against SDPA by document, with a slow kernel of the same contract in its place."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM, LlamaConfig

from lit_alignment.errors import ConfigError
from lit_alignment.models import attention as attention_module
from lit_alignment.models import varlen
from lit_alignment.models.attention import (
    Known,
    check_sequence_parallel,
    choose_attention,
    document_arguments,
    document_attention,
    known_attentions,
)
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.head import hidden_states
from lit_alignment.models.isolation import check_isolation
from lit_alignment.models.loading import BackboneConfig, load_network, load_tokenizer
from lit_alignment.models.tokens import TokensConfig
from tests.helpers import DECODER_SIZE, ROOT
from tests.helpers.varlen import newest, oldest, top_left, use_kernel, without_gradient_of_keys

CPU = torch.device("cpu")
NAMES = ("document_varlen", "document_sdpa")
ROWS = {  # lengths of the documents, and what they continue
    "documents": ([5, 11, 1, 8], None),
    "shared prompts": ([7, 3, 9, 1, 6, 4, 2, 5], [-1, 0, 0, 0, -1, -1, 5, 5]),
}


def network(name, implementation, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(DECODER_SIZE | {"initializer_range": 0.2, "pad_token_id": 0} | settings))
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def positions(lengths, parents):
    begins = [0 if parent < 0 else lengths[parent] for parent in parents or [-1] * len(lengths)]
    return torch.cat([torch.arange(b, b + n) for b, n in zip(begins, lengths, strict=True)])[None]


@pytest.mark.parametrize("kernel", [newest, oldest])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 4}, {"scaling": 0.7}], ids=str)
def test_outputs_and_gradients_are_those_of_sdpa_by_document(monkeypatch, kernel, row, key_heads, settings):
    use_kernel(monkeypatch, kernel)
    torch.manual_seed(0)
    lengths, parents = ROWS[row]
    shapes = [(1, heads, sum(lengths), 8) for heads in (4, key_heads, key_heads)]
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(1, sum(lengths), 4, 8, dtype=torch.float64)
    outputs, gradients = [], []
    for implementation in NAMES:
        arguments = document_arguments(implementation, lengths, CPU, parents)
        output, _ = document_attention(torch.nn.Identity(), *whole, None, **arguments, **settings)
        outputs.append(output)
        gradients.append(torch.autograd.grad((output * weight).sum(), whole))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kernel", [newest, oldest])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma3_text", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_a_model_s_gradients_are_those_under_sdpa_by_document(monkeypatch, kernel, name, settings):
    """Of all its weights, in a row in which three responses share a prompt."""
    seen = []
    use_kernel(monkeypatch, counted(kernel, seen))
    lengths, parents = ROWS["shared prompts"]
    ids, weight = torch.randint(3, 300, (1, sum(lengths))), torch.randn(1, sum(lengths), 64)
    found = []
    for requested in ("varlen", "sdpa"):
        implementation = choose_attention(requested, True, "cuda", LlamaConfig(), shared_prompts=True)
        model = network(name, implementation, **settings)
        arguments = document_arguments(implementation, lengths, CPU, parents)
        hidden = hidden_states(model, input_ids=ids, position_ids=positions(lengths, parents), **arguments)
        (hidden * weight).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"hidden": hidden})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    windows = {"llama": 0, "mistral": 2, "gemma3_text": 1}[name]
    assert len(seen) == (2 if kernel is newest else 2 - windows)
    assert len(set(seen)) <= 1, "boundaries are moved to the device again in a layer"


def counted(kernel, seen):
    """The same kernel, which notes the boundaries that it is given."""

    def call(query, key, value, cu_seq_q, cu_seq_k, *rest, **options):
        seen.append((id(cu_seq_q), id(cu_seq_k)))
        return kernel(query, key, value, cu_seq_q, cu_seq_k, *rest, **options)

    call.__wrapped__ = kernel  # whose signature it has
    return call


@pytest.mark.parametrize(
    ("dtype", "width", "settings", "kernel"),
    [
        (torch.bfloat16, 8, {}, newest),
        (torch.bfloat16, 8, {"sliding_window": 4}, newest),
        (torch.bfloat16, 8, {"sliding_window": 9}, oldest),
        (torch.bfloat16, 8, {"sliding_window": 8}, None),  # oldest, which lacks it
        (torch.float32, 8, {}, None),
        (torch.bfloat16, 12, {}, None),
        (torch.bfloat16, 264, {}, None),
        (torch.bfloat16, 8, {"dropout": 0.1}, None),
    ],
)
def test_layers_that_the_kernel_does_not_compute_are_left_to_sdpa(monkeypatch, dtype, width, settings, kernel):
    seen, plain = [], varlen.DTYPES
    use_kernel(monkeypatch, counted(kernel or oldest, seen))
    monkeypatch.setattr(varlen, "DTYPES", plain)
    part = torch.randn(1, 2, 12, width, dtype=dtype)
    arguments = document_arguments("document_varlen", [9, 3], CPU)
    output, _ = document_attention(torch.nn.Identity(), part, part, part, None, **arguments, **settings)
    assert output.shape == (1, 12, 2, width) and bool(seen) == (kernel is not None)


def test_autocast_decides_the_precision_of_the_kernel(monkeypatch):
    """Layer norms of queries and keys may make them fp32, beside values in bf16."""
    seen, plain = [], varlen.DTYPES
    use_kernel(monkeypatch, counted(newest, seen))
    monkeypatch.setattr(varlen, "DTYPES", plain)
    query = torch.randn(1, 2, 12, 8)
    arguments = document_arguments("document_varlen", [9, 3], CPU)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = document_attention(torch.nn.Identity(), query, query, query.bfloat16(), None, **arguments)
    assert len(seen) == 1 and output.dtype == torch.bfloat16


@pytest.mark.parametrize("shared", [False, True])
def test_isolation_check_accepts_it_and_notices_another_alignment(monkeypatch, shared):
    backbone = BackboneConfig(str(ROOT / "configs/tiny"), weights="random", attention="varlen")
    tokenizer, _ = load_tokenizer(backbone, TokensConfig())
    use_kernel(monkeypatch)
    model = load_network(backbone, tokenizer, packing=True, shared_prompts=shared, device_type="cuda")
    assert model.config._attn_implementation == "document_varlen"
    check_isolation(model, packing=True, shared_prompts=shared)
    use_kernel(monkeypatch, top_left)
    if shared:
        with pytest.raises(ConfigError, match="documents of a packed row are not kept apart"):
            check_isolation(model, packing=True, shared_prompts=shared)


def without(function):
    """A kernel that does not run on the device."""

    def call(*arguments, **options):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    return call


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (newest, None),
        (oldest, None),
        (top_left, "does not compute what SDPA does on cpu"),
        (without_gradient_of_keys, "does not compute what SDPA does on cpu"),
        (without(newest), "does not run on cpu: FlashAttention only supports Ampere"),
    ],
)
def test_kernel_is_compared_with_sdpa_before_it_is_used(function, reason):
    with torch.inference_mode():  # in which predict may load a model
        found = varlen.differs_from_sdpa(varlen.kernel_of(function), CPU)
    assert found is None if reason is None else reason in found


def test_installed_kernel_is_torch_s_own_and_what_it_takes_is_read_from_its_signature():
    from torch.nn.attention.varlen import varlen_attn

    assert varlen.installed_kernel() == varlen.Kernel(varlen_attn, window_size=True, scale=True, enable_gqa=True)
    assert varlen.kernel_of(oldest) == varlen.Kernel(oldest, window_size=False, scale=False, enable_gqa=False)


@pytest.mark.parametrize(
    ("requested", "device", "packing", "shared", "installed", "expected"),
    [
        ("auto", "cuda", True, False, (), "document_varlen"),
        ("auto", "cuda", True, True, (), "document_varlen"),
        ("auto", "cuda", True, False, (2,), "flash_attention_2"),
        ("auto", "cuda", True, False, (2, 3), "flash_attention_3"),
        ("auto", "cuda", True, True, (2, 3), "document_varlen"),
        ("auto", "cuda", True, True, ("obstacle",), "document_sdpa"),
        ("auto", "cuda", True, False, ("obstacle",), "document_sdpa"),
        ("auto", "cuda", False, False, (), "document_sdpa"),
        ("auto", "cuda", False, True, (2,), "flash_attention_2"),
        ("auto", "cpu", True, True, (2, 3), "document_sdpa"),
        ("varlen", "cuda", True, True, (2,), "document_varlen"),
        ("varlen", "cuda", False, False, (), "document_sdpa"),
        ("sdpa", "cuda", True, True, (2,), "document_sdpa"),
    ],
)
def test_choice_of_attention(monkeypatch, requested, device, packing, shared, installed, expected):
    use_kernel(monkeypatch)
    monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: 2 in installed)
    monkeypatch.setattr(attention_module, "is_flash_attn_3_available", lambda: 3 in installed)
    if "obstacle" in installed:
        monkeypatch.setattr(attention_module, "varlen_obstacle", lambda: "it is broken")
    assert choose_attention(requested, packing, device, LlamaConfig(), shared) == expected


@pytest.mark.parametrize("shared", [False, True])
def test_architectures_that_sdpa_does_not_compute_get_flex_or_are_refused(monkeypatch, shared):
    """Those that cap their scores or have sinks."""
    use_kernel(monkeypatch)
    if not shared:
        assert choose_attention("auto", True, "cuda", LlamaConfig(), known=Known(sdpa=False)) == "flex_attention"
    with pytest.raises(ConfigError, match="SDPA does not compute this architecture's attention"):
        choose_attention("auto" if shared else "varlen", True, "cuda", LlamaConfig(), shared, Known(sdpa=False))
    with pytest.raises(ConfigError, match="SDPA does not compute this architecture's attention"):
        choose_attention("auto", True, "cuda", LlamaConfig(), shared, Known(sdpa=False, flex=False))


def test_flash_attention_is_for_architectures_that_have_it(monkeypatch):
    use_kernel(monkeypatch)
    monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: True)
    assert choose_attention("auto", True, "cuda", LlamaConfig(), known=Known(flash=False)) == "document_varlen"
    assert choose_attention("auto", False, "cuda", LlamaConfig(), known=Known(flash=False)) == "document_sdpa"
    falcon = known_attentions(FalconForCausalLM, FalconConfig())
    assert falcon == Known(sdpa=True, flash=True, flex=False)


@pytest.mark.parametrize(
    ("device", "why"), [("cpu", "it needs a CUDA GPU, and this run is on cpu"), ("cuda", "broken")]
)
def test_kernel_that_cannot_be_used_is_refused(monkeypatch, device, why):
    monkeypatch.setattr(attention_module, "varlen_obstacle", lambda: "it is broken")
    with pytest.raises(ConfigError, match=rf"backbone.attention: varlen cannot be used: .*{why}\. Use auto or sdpa"):
        choose_attention("varlen", True, device, LlamaConfig())


def test_ranks_that_share_a_row_compute_it_by_sdpa(monkeypatch):
    use_kernel(monkeypatch)
    check_sequence_parallel(LlamaConfig(num_attention_heads=4), 2, True, "document_varlen")
    sequence = SequenceGroup(None, 0, 2)
    assert document_arguments("document_varlen", [5, 3], CPU, None, sequence) == document_arguments(
        "document_sdpa", [5, 3], CPU, None, sequence
    )
