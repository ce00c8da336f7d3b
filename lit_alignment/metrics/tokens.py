"""Means over tokens."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """Sum of a quantity over trained tokens, divided once by their number (or total weight) on all ranks.

    mean = sum_batches total / sum_batches weight

    A mean of batch means would weigh a token by the size of its batch.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        """Start at zero, in float64: sums over a validation set outgrow float32."""
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, total: Tensor, weight: Tensor | float) -> None:
        """Add a batch: the summed quantity and the weight it was summed over, scalars."""
        self.total += total.detach().double()
        self.weight += weight.detach().double() if isinstance(weight, Tensor) else weight

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; nan without tokens."""
        return self.total / self.weight
