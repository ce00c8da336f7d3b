"""Steps in half precision: the gradient norm is logged as it is, and adapters keep their precision."""

import pytest
import torch
from lightning.pytorch import seed_everything

from lit_alignment import SFTModule
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers.devices import BOTH, LORA, fit


def last_norm(folder, base, accelerator, precision):
    """The gradient norm of the last of four steps that hardly change the weights, and the precisions of these."""
    seed_everything(0, verbose=False)
    optimizer = OptimizerConfig(learning_rate=1e-7, schedule="constant", warmup=0)
    module = SFTModule(BackboneConfig(base, dtype="float32"), LORA, optimizer=optimizer)
    _, runner = fit(folder, module, accelerator=accelerator, precision=precision)
    return float(runner.callback_metrics["train/grad_norm"]), {p.dtype for p in module.network.parameters()}


@BOTH
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_logged_norm_is_that_of_float32(precision, accelerator, base, tmp_path):
    """Under fp16 after the scaler's factor, 65536, was taken out; a CPU takes bf16 in its place."""
    expected, _ = last_norm(tmp_path, base, accelerator, "32-true")
    found, dtypes = last_norm(tmp_path, base, accelerator, precision)
    assert found == pytest.approx(expected, rel=0.05)
    assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
