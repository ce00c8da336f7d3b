"""What Liger's patches leave of the architecture's Python module, with a stand-in for its kernels."""

import sys
from types import MethodType, ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from lit_alignment.errors import ConfigError
from lit_alignment.models.liger import apply_liger
from tests.helpers import DECODER_SIZE

IDS = torch.arange(3, 20)[None]


PLAIN = modeling_llama.LlamaRMSNorm
calls = []


def fused_norm(self, hidden_states):
    calls.append("norm")
    return PLAIN.forward(self, hidden_states)


class FusedNorm(PLAIN):
    forward = fused_norm


def only_for_gpus(*args, **kwargs):
    raise RuntimeError("cpu tensor?")


def patch(model, **kwargs):
    """As Liger's own does: names of the architecture's Python module, and layers of the model."""
    assert kwargs == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    if model.config.model_type == "gemma3_text":
        raise TypeError("The model must be Gemma3ForCausalLM.")
    if model.config.model_type == "llama":  # another gets its loss alone from Liger
        modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm = only_for_gpus, FusedNorm
        for layer in model.modules():
            if isinstance(layer, PLAIN):
                layer.forward = MethodType(fused_norm, layer)


@pytest.fixture(autouse=True)
def _liger(monkeypatch):
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "nemotron": None, "gemma3_text": None}
    patches._apply_liger_kernel_to_instance = patch
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))  # so that it is put back
    calls.clear()


def model_of(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **DECODER_SIZE)).eval()


@torch.no_grad()
def test_kernels_are_in_the_model_and_in_none_that_is_loaded_later():
    fused = model_of("llama")
    expected = fused(input_ids=IDS).logits
    apply_liger(fused)
    assert torch.equal(fused(input_ids=IDS).logits, expected) and len(calls) == 5
    later = model_of("llama")
    assert torch.equal(later(input_ids=IDS).logits, expected) and len(calls) == 5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen2", "Liger has no kernels for qwen2. Set it to false"),
        ("nemotron", "no kernels for nemotron but its loss"),
        ("gemma3_text", "cannot change a Gemma3ForCausalLM .The model must be"),
    ],
)
def test_architecture_without_kernels_is_refused(kind, message):
    with pytest.raises(ConfigError, match=f"backbone.liger: .*{message}"):
        apply_liger(model_of(kind))
