"""What becomes of an optimizer step whose loss or gradient is non-finite."""

import warnings
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_alignment.errors import TrainingError


def refuse_or_skip(
    module: LightningModule, what: Literal["stop", "skip"], window: list[tuple[list[str], Tensor]]
) -> None:
    """Stop, or leave the weights as they are, saying which records did it.

    Args:
        module: That trains.
        what: Which of both.
        window: Ids and loss of each micro-batch of the step.

    Raises:
        TrainingError: If it is to stop.
    """
    bad = [name for ids, loss in window if not bool(torch.isfinite(loss)) for name in ids]
    which = ", ".join(bad) or "none by itself on this rank; the gradient is not finite"
    step = module.trainer.global_step
    if what == "stop":
        raise TrainingError(
            f"the loss of optimizer step {step} is non-finite. Offending micro-batches: {which}. Lower "
            "optimizer.learning_rate or fix the records, and resume from a checkpoint; or set "
            "optimizer.non_finite: skip."
        )
    warnings.warn(f"optimizer step {step} is skipped, its loss is non-finite: {which}", stacklevel=2)
    for parameter in module.parameters():
        parameter.grad = None
