"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay is {self.weight_decay}; use 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas are {[*self.betas]}; use two numbers from 0 up to, but not, 1.")
        if self.eps <= 0:
            raise ConfigError(f"optimizer.eps is {self.eps}; use a number above 0.")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"optimizer.min_ratio is {self.min_ratio}; use a share between 0 and 1.")
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"optimizer.decay_share is {self.decay_share}; use a share above 0, at most 1.")


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
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    total_steps: float | Callable[[], float],
    fused: bool = True,
    other_rates: Sequence[tuple[Iterable[nn.Parameter], float]] = (),
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW over the trainable parameters, and its schedule.

    Args:
        parameters: Candidates; those that do not require gradients are left out.
        config: Settings.
        total_steps: Optimizer steps of the run, may be infinite; called at each step, if it can be.
        fused: Use the fused kernel; the gradient scaler of fp16 training cannot clip with it.
        other_rates: Some of the parameters, and their highest learning rate.

    Raises:
        ConfigError: If nothing is trainable, or the schedule needs an end that the run does not have.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ConfigError("no parameter is trainable: set model.peft, or model.adapter.trainable to true.")
    share = isinstance(config.warmup, float) and config.warmup > 0
    total = total_steps if callable(total_steps) else lambda: total_steps
    if math.isinf(total()) and (config.schedule != "constant" or share):
        raise ConfigError("this schedule needs an end: set trainer.max_steps or trainer.max_epochs.")
    rates = [config.learning_rate, *(rate for _, rate in other_rates)]
    part_of = {id(parameter): number for number, (part, _) in enumerate(other_rates, 1) for parameter in part}
    # Groups by what a parameter is, and not by its settings: these may be others when the run is resumed.
    parts: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in trainable:
        parts.setdefault((part_of.get(id(parameter), 0), parameter.ndim >= 2), []).append(parameter)
    groups = [
        {"params": part, "lr": rates[number], "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (number, is_matrix), part in parts.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
    # The scaler of fp16 never meets the fused kernel, for which Lightning would refuse to clip under bf16-mixed.
    optimizer._step_supports_amp_scaling = False
    order = [id(parameter) for parameter in trainable]
    optimizer.register_load_state_dict_pre_hook(lambda own, state: _regrouped(own, state, order))
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, total(), config))


def _regrouped(optimizer: torch.optim.Optimizer, state: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """A state whose groups are those of equal settings, as earlier versions had them, in the optimizer's groups.

    Args:
        optimizer: That loads it.
        state: To load; parameters are numbered group by group.
        order: Ids of the parameters as the module has them.
    """
    then, now = state["param_groups"], optimizer.param_groups
    if len(then) == len(now):
        return state
    decay = max(group["weight_decay"] for group in then)
    kind = {id(p): (group["initial_lr"], decay if p.ndim >= 2 else 0.0) for group in now for p in group["params"]}
    grouped: dict[tuple[float, float], list[int]] = {}
    for parameter in order:
        grouped.setdefault(kind[parameter], []).append(parameter)
    numbers = {p: n for n, p in enumerate(p for part in grouped.values() for p in part)}
    own = [[numbers[id(p)] for p in group["params"]] for group in now]
    counted = {old: new for new, old in enumerate(number for part in own for number in part)}
    first = then[0]
    groups, begin = [], 0
    for group, part in zip(now, own, strict=True):
        settings = {key: group.get(key, value) for key, value in first.items()}
        groups.append(settings | {"lr": first["lr"], "params": list(range(begin, begin + len(part)))})
        begin += len(part)
    return {"state": {counted[number]: each for number, each in state["state"].items()}, "param_groups": groups}


SETTINGS = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group of parameters, as the schedule found them."""
    return [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]


def apply_settings(optimizer: torch.optim.Optimizer, schedule: LambdaLR, settings: list[dict[str, Any]]) -> list[str]:
    """Put this run's settings in place of a checkpoint's, whose optimizer brings its own.

    Args:
        optimizer: Restored.
        schedule: Restored.
        settings: What `group_settings` gave before.

    Returns:
        What changed, as "name: old -> new".
    """
    changed: dict[str, None] = {}
    schedule.base_lrs = [own["initial_lr"] for own in settings]
    for number, (group, own) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
        for name, value in own.items():
            if group[name] != value and [*_listed(group[name])] != [*_listed(value)]:
                changed[f"{SETTINGS[name]}: {group[name]} -> {value}"] = None
        group.update(own)
        group["lr"] = own["initial_lr"] * schedule.lr_lambdas[number](schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return list(changed)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
