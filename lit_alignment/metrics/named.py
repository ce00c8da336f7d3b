"""Means of several quantities at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class NamedMeans(Metric):
    """Mean of each of several quantities over all of its values, on all ranks.

    Args:
        names: What the quantities are called.
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        """Start at zero, in float64."""
        super().__init__()
        self.names = list(names)
        for name in ("totals", "counts"):
            self.add_state(name, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, values: dict[str, Tensor], weights: Tensor | None = None) -> None:
        """Add values, [N] of each name, with an N of its own, or with the weights of all, [N]."""
        scale = 1.0 if weights is None else weights
        for name, each in values.items():
            position = self.names.index(name)
            self.totals[position] += (each.detach().double() * scale).sum()
            self.counts[position] += each.numel() if weights is None else weights.sum()

    def compute(self) -> dict[str, Tensor]:
        """The mean of each quantity of which there were values, float64 scalars."""
        means = zip(self.names, self.totals / self.counts, self.counts.tolist(), strict=True)
        return {name: mean for name, mean, count in means if count}
