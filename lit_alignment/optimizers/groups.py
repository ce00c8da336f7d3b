"""Which parameters share a learning rate and a decay: by part of the model, name, depth and shape."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from lit_alignment.errors import ConfigError

Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Roles:
    """What parameters are in their model.

    Args:
        other_rates: Parts of the model with a highest learning rate of their own.
        heights: Number of decoder layers between a parameter and the model's output, by its id; missing ones have 0.
        hidden: Ids of the matrices of the decoder layers.
    """

    other_rates: Sequence[tuple[Iterable[nn.Parameter], float]] = ()
    heights: Mapping[int, int] = field(default_factory=dict)
    hidden: AbstractSet[int] = frozenset()


@dataclass(frozen=True)
class Rates:
    """Learning rates and the decay of a run.

    Args:
        learning_rate: Highest, of what has no other.
        weight_decay: Of matrices.
        by_name: Others, by a pattern that is searched in names; the first that is found counts.
        layer_decay: Factor of the learning rate from a decoder layer to the one below it.
    """

    learning_rate: float
    weight_decay: float
    by_name: Mapping[str, float]
    layer_decay: float


def parameter_groups(named: Named, rates: Rates, roles: Roles, mark_hidden: bool) -> list[dict[str, Any]]:
    """Groups for an optimizer, with names.

    A parameter's group says what it is, and not its settings, as far as can be: these may be others when the run is
    resumed.

    Args:
        named: Trainable parameters by name.
        rates: The settings.
        roles: What the parameters are.
        mark_hidden: Whether hidden matrices are groups of their own, with `hidden: True`.

    Raises:
        ConfigError: If a pattern is in no name.
    """
    patterns = [*rates.by_name]
    pattern_of = {name: next((n for n, p in enumerate(patterns) if re.search(p, name)), None) for name, _ in named}
    _check_patterns(patterns, list(pattern_of))
    part_of = {id(parameter): n for n, (part, _) in enumerate(roles.other_rates, 1) for parameter in part}
    highest = [rates.learning_rate, *(rate for _, rate in roles.other_rates)]
    members: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    rate_of: dict[Any, float] = {}
    for name, parameter in named:
        own, part, pattern = id(parameter), part_of.get(id(parameter), 0), pattern_of[name]
        height = 0 if rates.layer_decay == 1 or pattern is not None else roles.heights.get(own, 0)
        key = (part, parameter.ndim >= 2, pattern, height, mark_hidden and own in roles.hidden)
        members.setdefault(key, []).append((name, parameter))
        decayed = highest[part] * rates.layer_decay**height
        rate_of[key] = decayed if pattern is None else rates.by_name[patterns[pattern]]
    return [
        {"params": part, "lr": rate_of[key], "weight_decay": rates.weight_decay if key[1] else 0.0}
        | ({"hidden": key[4]} if mark_hidden else {})
        for key, part in members.items()
    ]


def _check_patterns(patterns: list[str], names: list[str]) -> None:
    """Refuse a pattern that is in no name, with the nearest parts of names."""
    words = sorted({word for name in names for word in name.split(".") if not word.isdigit()})
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            near = get_close_matches(pattern.rpartition(".")[2], words, n=3, cutoff=0.5) or words[:12]
            raise ConfigError(
                f"optimizer.rates has '{pattern}', which is in the name of no trainable parameter. Remove it, or use "
                f"a part of a name, such as {', '.join(near)}."
            )


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What an optimizer's step is given to evaluate: its loss, with gradients; None if there is nothing."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
