"""The load-balancing loss of a mixture of experts, as transformers counts it.

A model whose configuration says `output_router_logits` computes it in each forward pass, over the tokens that are no
padding. Source: Fedus et al. 2021 (arXiv:2101.03961), equations (4) to (6).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_found: ContextVar[list[Tensor] | None] = ContextVar("router_losses", default=None)


@contextmanager
def router_losses() -> Iterator[list[Tensor]]:
    """The losses of the forward passes that are made meanwhile, but for those without gradient, as of a reference."""
    found: list[Tensor] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def note_router_loss(output: Any) -> None:
    """Note the loss in what a model's forward pass returns, if there is one and it is asked for."""
    found, loss = _found.get(), getattr(output, "aux_loss", None)
    if found is not None and isinstance(loss, Tensor) and torch.is_grad_enabled():
        found.append(loss)
