"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_alignment.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: Highest learning rate.
        weight_decay: Decoupled decay of matrices; biases and norms are not decayed.
        betas: Averaging factors of the two moments.
        eps: Added to the denominator.
        schedule: Course after warm-up; `wsd` stays constant and falls linearly at the end.
        warmup: Steps of linear warm-up if an integer, else their share of all steps.
        min_ratio: Where cosine, linear and wsd end, as a share of the learning rate.
        decay_share: Share of all steps in which wsd falls.
        non_finite: What to do when a step's loss or gradient is non-finite: `stop`, or `skip` the step; either names
            the records.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: int | float = 0.03
    min_ratio: float = 0.0
    decay_share: float = 0.2
    non_finite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; use a number above 0.")
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ConfigError(f"optimizer.warmup is {self.warmup}; use steps (an integer) or a share between 0 and 1.")


def learning_rate_factor(step: int, total_steps: float, config: OptimizerConfig) -> float:
    """The learning rate of an optimizer step, as a share of the highest one.

    Args:
        step: Optimizer step, from 0.
        total_steps: All steps of the run; only `constant` with warm-up in steps works without an end.
        config: The schedule.

    Source: cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983); wsd: Hu et al. 2024 (arXiv:2404.06395).
    """
    warmup = config.warmup if isinstance(config.warmup, int) else math.ceil(config.warmup * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match config.schedule:
        case "cosine":
            falling = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            falling = 1 - progress
        case "wsd":
            falling = min(1.0, max(0.0, (total_steps - step) / max(1.0, config.decay_share * total_steps)))
    return config.min_ratio + (1 - config.min_ratio) * falling


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    total_steps: float,
    fused: bool = True,
    other_rates: Sequence[tuple[Iterable[nn.Parameter], float]] = (),
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW over the trainable parameters, and its schedule.

    Args:
        parameters: Candidates; those that do not require gradients are left out.
        config: Settings.
        total_steps: Optimizer steps of the run, may be infinite.
        fused: Use the fused kernel; the gradient scaler of fp16 training cannot clip with it.
        other_rates: Some of the parameters, and their highest learning rate.

    Raises:
        ConfigError: If nothing is trainable, or the schedule needs an end that the run does not have.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ConfigError("no parameter is trainable: set model.peft, or model.adapter.trainable to true.")
    share = isinstance(config.warmup, float) and config.warmup > 0
    if math.isinf(total_steps) and (config.schedule != "constant" or share):
        raise ConfigError("this schedule needs an end: set trainer.max_steps or trainer.max_epochs.")
    rates = {id(parameter): rate for part, rate in other_rates for parameter in part}
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trainable:
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        parts.setdefault((rates.get(id(parameter), config.learning_rate), decay), []).append(parameter)
    groups = [{"params": part, "lr": rate, "weight_decay": decay} for (rate, decay), part in parts.items()]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, config))
