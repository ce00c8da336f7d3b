"""PyTorch's variable-length kernel on the device, against SDPA by document."""

import pytest
import torch

from lit_alignment.models.attention import choose_attention, document_arguments, document_attention
from lit_alignment.models.isolation import check_isolation
from lit_alignment.models.loading import BackboneConfig, load_network, load_tokenizer
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.models.varlen import installed_kernel, varlen_obstacle
from tests.helpers import ROOT

pytestmark = pytest.mark.gpu
LENGTHS, PARENTS = [200, 70, 1, 130, 90, 33], [-1, 0, 0, 0, -1, -1]


@pytest.fixture(autouse=True)
def kernel():
    pytest.importorskip("torch.nn.attention.varlen", reason="came with PyTorch 2.10")
    return installed_kernel()


def tensors(width=64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), width) for heads in (8, 2, 2)]
    return [torch.randn(s, generator=generator).to("cuda", torch.bfloat16).requires_grad_() for s in shapes]


def outputs_and_gradients(implementation, inputs, **settings):
    """Of a row in which three responses share a prompt, on the device."""
    arguments = document_arguments(implementation, LENGTHS, inputs[0].device, PARENTS)
    output, _ = document_attention(torch.nn.Identity(), *inputs, None, **arguments, **settings)
    return output, *torch.autograd.grad(output.square().sum(), inputs)


def test_last_query_of_a_document_sees_its_last_key():
    assert varlen_obstacle() is None


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 50}, {"scaling": 0.2}], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_shared_prompts_have_outputs_and_gradients_of_sdpa(kernel, settings, width):
    if "sliding_window" in settings and not kernel.window_size:
        pytest.skip("the installed PyTorch's kernel has no windows")
    inputs = tensors(width)
    pairs = (outputs_and_gradients(name, inputs, **settings) for name in ("document_varlen", "document_sdpa"))
    for found, expected in zip(*pairs, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-2 * float(expected.abs().max()))


def test_no_layer_waits_for_the_device():
    inputs = tensors()
    outputs_and_gradients("document_varlen", inputs)  # what is done once
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_gradients("document_varlen", inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shared", [False, True])
def test_documents_are_kept_apart(shared):
    backbone = BackboneConfig(str(ROOT / "configs/tiny"), weights="random", dtype="bfloat16", attention="varlen")
    tokenizer, _ = load_tokenizer(backbone, TokensConfig())
    model = load_network(backbone, tokenizer, packing=True, shared_prompts=shared, device_type="cuda").cuda()
    assert model.config._attn_implementation == choose_attention("varlen", True, "cuda", model.config, shared)
    check_isolation(model, packing=True, shared_prompts=shared)
