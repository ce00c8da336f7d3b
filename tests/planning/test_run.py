"""Which settings are advised where memory is short."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from peft import LoraConfig

from lit_alignment.models.loading import BackboneConfig
from lit_alignment.planning.run import GIB, helpful_settings, out_of_memory

PARTS = {"weights": 16 * GIB, "gradients": GIB, "optimizer": 2 * GIB, "activations": 40 * GIB, "logits and loss": GIB}
PACKED = SimpleNamespace(
    packing=True, tokens_per_batch=8192, batch_size=8, encoding=SimpleNamespace(max_length=8192), share_prompts=False
)
ONE_GPU = {"strategy": "auto", "devices": 1, "num_nodes": 1, "precision": "bf16-mixed", "accelerator": "gpu"}


@dataclass
class Configured:
    backbone: BackboneConfig
    peft_config: LoraConfig | None = None
    adapter: None = None


LORA = Configured(BackboneConfig("x", gradient_checkpointing="full"), LoraConfig())


@pytest.mark.parametrize(
    ("module", "data", "parts", "expected"),
    [
        (
            Configured(BackboneConfig("x")), PACKED, PARTS,
            ["gradient_checkpointing: full (saves about 34", "and data.tokens_per_batch: 4096 (saves about 2"],
        ),
        (
            Configured(BackboneConfig("x")), PACKED, PARTS | {"gradients": 16 * GIB, "optimizer": 32 * GIB},
            ["model.peft: a peft.LoraConfig, which trains a small part (saves about 46", "checkpointing: full"],
        ),
        (LORA, PACKED, PARTS, ["data.encoding.max_length", "activation_offload: true (saves about 20", "nf4 (saves"]),
        (
            LORA, SimpleNamespace(**vars(PACKED) | {"tokens_per_batch": 16384}), PARTS | {"activations": 90 * GIB},
            ["data.tokens_per_batch: 8192, with more trainer.accumulate_grad_batches (saves about 45", "offload"],
        ),
        (
            LORA, SimpleNamespace(**vars(PACKED) | {"packing": False}), PARTS | {"activations": 90 * GIB},
            ["data.batch_size: 4, with more trainer.accumulate_grad_batches (saves about 45", "offload"],
        ),
    ],
    ids=["activations", "states", "lora", "several-examples-a-row", "padded"],
)  # fmt: skip
def test_settings_that_save_the_most_come_first(module, data, parts, expected):
    found = helpful_settings(parts, module, data, ONE_GPU)
    assert len(found) == 3
    for text, setting in zip(expected, found, strict=False):
        assert text in setting


def test_settings_that_a_run_has_or_cannot_have_are_not_advised():
    offloaded = replace(LORA, backbone=replace(LORA.backbone, activation_offload=True, quantization="nf4"))
    found = " ".join(helpful_settings(PARTS, offloaded, PACKED, ONE_GPU))
    assert "offload" not in found and "nf4" not in found and "checkpointing" not in found and "FSDP2" in found
    on_cpu = " ".join(helpful_settings(PARTS, LORA, PACKED, ONE_GPU | {"accelerator": "cpu"}))
    assert "offload" not in on_cpu and "nf4" not in on_cpu


def test_simulation_that_fails_does_not_hide_that_memory_was_short():
    message = out_of_memory(LORA, PACKED, ONE_GPU, "CUDA out of memory. Tried.\nmore")
    assert message.startswith("out of memory (CUDA out of memory. Tried). `lit-alignment")
    assert "cannot say why (AttributeError: " in message
