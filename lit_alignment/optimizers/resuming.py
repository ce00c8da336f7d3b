"""An optimizer of a checkpoint in a run whose groups of parameters, or settings, are others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_alignment.errors import CheckpointError

SHOWN = {"initial_lr": "learning_rate"}  # of what a group has, what the settings call otherwise


def regrouped(optimizer: torch.optim.Optimizer, state: dict[str, Any], order: list[int] | None) -> dict[str, Any]:
    """A state in the optimizer's groups, whatever groups it was saved in.

    Args:
        optimizer: That loads it.
        state: To load; parameters are numbered group by group.
        order: Ids of the parameters as the module has them; None where groups are others than of earlier versions.

    Raises:
        CheckpointError: If it is of an earlier version, and groups are others.
    """
    then, now = state["param_groups"], optimizer.param_groups
    own = [group["param_names"] for group in now]
    stored = [name for group in then for name in group.get("param_names") or ()]
    saved = [number for group in then for number in group["params"]]
    if len(saved) < len(stored):
        return state  # of DeepSpeed, which makes one vector of each group
    if stored:
        numbers = dict(zip(stored, saved, strict=True))
        if set(numbers) != {name for part in own for name in part}:
            return state  # of other parameters, which torch refuses
        if [group["param_names"] for group in then] == own:
            return state
        return _in_groups(state, now, [[numbers[name] for name in part] for part in own])
    if order is None:
        raise CheckpointError(
            "the checkpoint's optimizer does not name its weights. Resume it without optimizer.rates and layer_decay."
        )
    if len(then) == len(now):
        return state
    # Of an earlier version, whose groups are those of equal settings.
    decay = max(group["weight_decay"] for group in then)
    kind = {id(p): (group["initial_lr"], decay if p.ndim >= 2 else 0.0) for group in now for p in group["params"]}
    grouped: dict[tuple[float, float], list[int]] = {}
    for parameter in order:
        grouped.setdefault(kind[parameter], []).append(parameter)
    numbers = {p: n for n, p in enumerate(p for part in grouped.values() for p in part)}
    return _in_groups(state, now, [[numbers[id(p)] for p in group["params"]] for group in now])


def _in_groups(state: dict[str, Any], now: list[dict[str, Any]], parts: list[list[Any]]) -> dict[str, Any]:
    """A state in other groups.

    Args:
        state: As it was saved.
        now: The groups.
        parts: The numbers, as they were saved, of each group's parameters.
    """
    counted = {old: new for new, old in enumerate(number for part in parts for number in part)}
    group_of = {number: group for group in state["param_groups"] for number in group["params"]}
    groups, begin = [], 0
    for group, part in zip(now, parts, strict=True):
        first = group_of.get(part[0], state["param_groups"][0])
        settings = {key: group.get(key, value) for key, value in first.items()}
        own = {"lr": first["lr"], "params": list(range(begin, begin + len(part))), "param_names": group["param_names"]}
        groups.append(settings | own)
        begin += len(part)
    return {"state": {counted[number]: each for number, each in state["state"].items()}, "param_groups": groups}


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group of parameters, as the schedule found them; flags are always the run's own."""
    names = [name for name, value in optimizer.defaults.items() if name != "lr" and not isinstance(value, bool | None)]
    kept = ["initial_lr", "weight_decay", *names]
    return [{name: group[name] for name in dict.fromkeys(kept) if name in group} for group in optimizer.param_groups]


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
            if name in group and _listed(group[name]) != _listed(value):
                changed[f"{SHOWN.get(name, name)}: {group[name]} -> {value}"] = None
        group.update(own)
        rate = own["initial_lr"] * schedule.lr_lambdas[number](schedule.last_epoch)
        if isinstance(group["lr"], Tensor):  # of algorithms that are compiled
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return list(changed)


def _listed(value: Any) -> Sequence[Any]:
    return [*value] if isinstance(value, list | tuple) else [value]
