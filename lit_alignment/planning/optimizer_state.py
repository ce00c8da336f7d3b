"""Bytes of an optimizer's states, counted from the optimizer itself: after a step on small weights.

R rows, C columns
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_alignment.errors import ConfigError
from lit_alignment.models.roles import roles_of
from lit_alignment.optimization import OptimizerConfig, algorithm_class

SIDE = 256  # of the smallest matrix that stands for large ones; states in 8 bits have blocks of up to 256 weights
LARGEST = SIDE * SIDE  # entries of weights that are tried as they are

Kind = tuple[torch.dtype, bool]  # of a weight, and whether it is a hidden matrix


def state_bytes(network: nn.Module, config: OptimizerConfig) -> int:
    """Bytes of the states of all trainable weights, scalars left out.

    Args:
        network: Whose weights need no values.
        config: The optimizer's settings.

    Raises:
        ConfigError: If the algorithm refuses its settings, or cannot make a step on a CPU.
    """
    name, hidden = algorithm_class(config).__name__, roles_of(network).hidden

    @cache
    def measured(shape: tuple[int, ...], kind: Kind) -> int:
        try:
            return _after_step(shape, kind, config)
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"optimizer.algorithm: {name} makes no step on a CPU ({reason}), so its states cannot be counted."
            ) from error

    def of_weight(shape: tuple[int, ...], kind: Kind) -> float:
        if len(shape) < 2 or math.prod(shape) <= LARGEST:
            return measured(shape, kind)
        # a + b R + c C + d R C, by four matrices.
        small, tall = measured((SIDE, SIDE), kind), measured((2 * SIDE, SIDE), kind)
        wide, large = measured((SIDE, 2 * SIDE), kind), measured((2 * SIDE, 2 * SIDE), kind)
        rows, columns = math.prod(shape[:-1]) / SIDE - 1, shape[-1] / SIDE - 1
        return small + (tall - small) * rows + (wide - small) * columns + (large - tall - wide + small) * rows * columns

    weights = Counter((tuple(p.shape), (p.dtype, id(p) in hidden)) for p in network.parameters() if p.requires_grad)
    return round(sum(number * of_weight(*weight) for weight, number in weights.items()))


def _after_step(shape: tuple[int, ...], kind: Kind, config: OptimizerConfig) -> int:
    """Bytes of the states of a weight of zeros."""
    dtype, hidden = kind
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    group: dict[str, Any] = {"params": [weight], "lr": config.learning_rate, "weight_decay": 0.0}
    if config.algorithm is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([group])
    else:
        optimizer = config.algorithm([group | {"hidden": hidden}], config.learning_rate)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    states = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.ndim]
    return sum(each.untyped_storage().nbytes() for state in states for each in _plain(state))


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The tensors that one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
