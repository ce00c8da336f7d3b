"""A run goes on from a checkpoint to the bit, dropout included."""

from dataclasses import replace

import torch
from lightning.pytorch import seed_everything

from lit_alignment import SFTModule
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import weights
from tests.helpers.devices import BOTH, LORA, fit


@BOTH
def test_resumed_run_is_equal_to_the_bit(accelerator, base, tmp_path):
    def run(folder, resume=None):
        seed_everything(0, verbose=False)
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)
        # The memory-efficient kernel, which SDPA takes for masked rows, sums gradients in any order.
        module = SFTModule(
            BackboneConfig(base, attention="eager"), replace(LORA, lora_dropout=0.3), optimizer=optimizer
        )
        options = {"accelerator": accelerator, "precision": "bf16-mixed", "deterministic": "warn"}
        seen, _ = fit(folder, module, resume, **options)
        return seen, weights(module)

    try:
        whole, expected = run(tmp_path)
        again, found = run(tmp_path / "again", tmp_path / "saved/step=1.ckpt")
    finally:
        torch.use_deterministic_algorithms(False)
    assert again.ids == whole.ids[1:] and again.losses == whole.losses[1:]
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
