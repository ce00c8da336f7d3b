"""Optimizer and learning-rate schedule."""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_alignment.errors import ConfigError, constructing
from lit_alignment.optimizers.groups import Rates, Roles, parameter_groups
from lit_alignment.optimizers.muon import MuonWithAdamW
from lit_alignment.optimizers.resuming import regrouped
from lit_alignment.optimizers.schedule_free import ScheduleFreeAdamW

Algorithm = Callable[[Iterable[Any], float], torch.optim.Optimizer]  # of groups of parameters, and a learning rate


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Args:
        learning_rate: Highest learning rate.
        weight_decay: Decay of matrices, as the algorithm does it; biases and norms are not decayed.
        betas: Averaging factors of AdamW's two moments, 0.9 and 0.999 where there are none.
        eps: Added to AdamW's denominator, 1e-8 where there is none.
        schedule: Course after warm-up; `wsd` stays constant and falls linearly at the end.
        warmup: Steps of linear warm-up if an integer, else their share of all steps.
        min_ratio: Where cosine, linear and wsd end, as a share of the learning rate.
        decay_share: Share of all steps in which wsd falls.
        non_finite: What to do when a step's loss or gradient is non-finite: `stop`, or `skip` the step; either names
            the records.
        algorithm: Any optimizer of torch's kind, of groups of parameters and a learning rate; None is AdamW.
        rates: Highest learning rates of parameters by a pattern that is searched in their names; the first that is
            found counts.
        layer_decay: The highest layer, and the head, have the learning rate, each layer below this share of the one
            above, and the embeddings of the lowest.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: int | float = 0.03
    min_ratio: float = 0.0
    decay_share: float = 0.2
    non_finite: Literal["stop", "skip"] = "stop"
    algorithm: Algorithm | None = None
    rates: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; use a number above 0.")
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ConfigError(f"optimizer.warmup is {self.warmup}; use steps (an integer) or a share between 0 and 1.")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay is {self.weight_decay}; use 0 or more.")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas are {[*self.betas]}; use two numbers from 0 up to, but not, 1.")
        if self.eps is not None and self.eps <= 0:
            raise ConfigError(f"optimizer.eps is {self.eps}; use a number above 0.")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"optimizer.min_ratio is {self.min_ratio}; use a share between 0 and 1.")
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"optimizer.decay_share is {self.decay_share}; use a share above 0, at most 1.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optimizer.layer_decay is {self.layer_decay}; use a share above 0, at most 1.")
        for name in ("betas", "eps"):
            if self.algorithm is not None and (value := getattr(self, name)) is not None:
                shown = [*value] if isinstance(value, tuple) else value
                raise ConfigError(
                    f"optimizer.{name} is {shown}, and optimizer.algorithm has settings of its own. Give it there, "
                    "under init_args, if the algorithm has it."
                )
        for pattern, rate in self.rates.items():
            if rate <= 0:
                raise ConfigError(f"optimizer.rates.{pattern} is {rate}; use a number above 0.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"optimizer.rates has '{pattern}', which is no pattern ({error}).") from error


def learning_rate_factor(step: int, total_steps: float, config: OptimizerConfig) -> float:
    """The learning rate of an optimizer step, as a share of the highest one.

    Args:
        step: Optimizer step, from 0.
        total_steps: All steps of the run; only `constant` with warm-up in steps works without an end.
        config: The schedule.

    Source: cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983); wsd: Hu et al. 2024 (arXiv:2404.06395).
    """
    warmup = config.warmup if isinstance(config.warmup, int) else math.ceil(config.warmup * total_steps)
    rising = (step + 1) / warmup if step < warmup else 1.0
    if config.schedule == "constant" or (config.schedule != "wsd" and step < warmup):
        return rising
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match config.schedule:
        case "cosine":
            falling = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            falling = 1 - progress
        case "wsd":
            falling = min(1.0, max(0.0, (total_steps - step) / max(1.0, config.decay_share * total_steps)))
    return min(rising, config.min_ratio + (1 - config.min_ratio) * falling)  # a short wsd falls before it has risen


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    total_steps: float | Callable[[], float],
    fused: bool = True,
    roles: Roles = Roles(),  # noqa: B008 - frozen
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """An optimizer of the trainable parameters, and its schedule.

    Args:
        named: Candidates by name; those that do not require gradients are left out.
        config: Settings.
        total_steps: Optimizer steps of the run, may be infinite; called at each step, if it can be.
        fused: Use the fused kernel of AdamW; the gradient scaler of fp16 training cannot clip with it.
        roles: What the parameters are in their model.

    Raises:
        ConfigError: If nothing is trainable, the schedule needs an end that the run does not have, or the algorithm
            refuses the parameters or its settings.
    """
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trainable:
        raise ConfigError("no parameter is trainable: set model.peft, or model.adapter.trainable to true.")
    share = isinstance(config.warmup, float) and config.warmup > 0
    total = total_steps if callable(total_steps) else lambda: total_steps
    if math.isinf(total()) and (config.schedule != "constant" or share):
        raise ConfigError("this schedule needs an end: set trainer.max_steps or trainer.max_epochs.")
    optimizer = grouped_optimizer(trainable, config, fused, roles)
    # The scaler of fp16 never meets the fused kernel, for which Lightning would refuse to clip under bf16-mixed.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    plain = not config.rates and config.layer_decay == 1
    order = [id(parameter) for _, parameter in trainable] if plain else None
    optimizer.register_load_state_dict_pre_hook(lambda own, state: regrouped(own, state, order))
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, total(), config))


def grouped_optimizer(
    trainable: list[tuple[str, nn.Parameter]], config: OptimizerConfig, fused: bool, roles: Roles
) -> torch.optim.Optimizer:
    """An optimizer by its settings, without a schedule; arguments are those of `build_optimizer`.

    Raises:
        ConfigError: If the algorithm refuses the parameters or its settings.
    """
    rates = Rates(config.learning_rate, config.weight_decay, config.rates, config.layer_decay)
    if config.layer_decay != 1 and not roles.heights:
        raise ConfigError(
            f"optimizer.layer_decay is {config.layer_decay}, and the model has no layers in a list. Use 1."
        )
    groups = parameter_groups(trainable, rates, roles, mark_hidden=config.algorithm is not None)
    if config.algorithm is None:
        betas, eps = config.betas or (0.9, 0.999), config.eps or 1e-8
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=eps, fused=fused)
    with constructing("optimizer.algorithm"):
        optimizer = config.algorithm(groups, config.learning_rate)
    _check_algorithm(optimizer, config)
    if isinstance(optimizer, MuonWithAdamW) and not any(group["hidden"] for group in groups):
        raise ConfigError(
            "optimizer.algorithm is MuonWithAdamW, and no hidden matrix is trainable: the factors of adapters are for "
            "AdamW. Leave algorithm out, or train the whole model."
        )
    return optimizer


def algorithm_class(config: OptimizerConfig) -> type[torch.optim.Optimizer]:
    """The class of optimizer that settings make.

    Raises:
        ConfigError: If it refuses its settings, or cannot be used.
    """
    if config.algorithm is None:
        return torch.optim.AdamW
    with constructing("optimizer.algorithm"):
        parts = [{"params": [nn.Parameter(torch.zeros(shape))], "lr": 1.0} for shape in ((2, 2), (2,))]
        optimizer = config.algorithm(parts, 1.0)
    _check_algorithm(optimizer, config)
    return type(optimizer)


def _check_algorithm(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Refuse an algorithm that would not do what the settings say."""
    kind = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer.algorithm makes a {kind.__name__}; use a class of torch.optim.Optimizer's kind.")
    if isinstance(optimizer, Switching):
        raise ConfigError(
            f"optimizer.algorithm: {kind.__name__} changes its weights in place for each validation, which rounds "
            "them. Use lit_alignment.ScheduleFreeAdamW, which keeps them."
        )
    if isinstance(optimizer, ScheduleFreeAdamW) and config.schedule != "constant":
        raise ConfigError(
            f"optimizer.schedule is {config.schedule}, and {kind.__name__} averages in place of a schedule. Set it to "
            "constant."
        )
    usual = inspect.signature(kind).parameters.get("weight_decay")
    if usual is None and config.weight_decay:
        raise ConfigError(f"optimizer.weight_decay is {config.weight_decay}; {kind.__name__} has none. Set it to 0.")
    own = optimizer.defaults.get("weight_decay")
    if usual is not None and own != usual.default:
        raise ConfigError(
            f"optimizer.algorithm: weight_decay is {own} there; set optimizer.weight_decay, which leaves biases and "
            "norms alone."
        )


@runtime_checkable
class Switching(Protocol):
    """An optimizer that has to be told when its weights are evaluated, as those of `schedulefree`."""

    def train(self) -> None:
        """Have the weights that are trained."""

    def eval(self) -> None:
        """Have the weights that are evaluated."""
