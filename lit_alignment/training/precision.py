"""What keeps its precision when the rest of a module is cast: metrics, positions, and the weights of a batch."""

from contextlib import nullcontext
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor, nn
from torchmetrics import Metric


class PreciseModule(LightningModule):
    """A module of which `trainer.precision` casts weights alone.

    Attributes:
        keeps_precision: Names of networks whose weights are not cast either.
    """

    keeps_precision: tuple[str, ...] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move, or cast, as torch asks each module to; metrics and derived buffers are only moved.

        The state of a metric is a sum over a data set. Buffers that no checkpoint has, such as the frequencies of
        rotary positions, are computed in float32: in bfloat16 far positions are off by several tokens.
        """
        networks = [network for name in self.keeps_precision if (network := self._modules.get(name)) is not None]
        whole = {id(layer) for network in networks for layer in network.modules()}
        kept = [_Kept(layer, id(layer) in whole) for layer in self.modules()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for each in kept:
            each.put_back()
        return self


class _Kept:
    """Buffers and metric states of one layer, as they are; of some also the weights."""

    def __init__(self, layer: nn.Module, weights: bool) -> None:
        self.layer = layer
        self.buffers = {n: b for n, b in layer._buffers.items() if weights or n in layer._non_persistent_buffers_set}
        self.weights = {n: p.data for n, p in layer._parameters.items() if p is not None} if weights else {}
        self.states: dict[str, Any] = {}
        if isinstance(layer, Metric):
            self.states = {name: getattr(layer, name) for name in layer._defaults}
            self.defaults: dict[str, Any] = dict(layer._defaults)

    def put_back(self) -> None:
        """Give what was cast its values again, on the device on which it is now."""
        for name, weight in self.weights.items():
            parameter: Any = self.layer._parameters[name]
            parameter.data = _moved(weight, parameter.data)
        for name, buffer in self.buffers.items():
            self.layer._buffers[name] = _moved(buffer, self.layer._buffers[name])
        if isinstance(self.layer, Metric):
            for name, state in self.states.items():
                setattr(self.layer, name, _moved(state, getattr(self.layer, name)))
                self.layer._defaults[name] = _moved(self.defaults[name], self.layer._defaults[name])


def _moved(before: Any, after: Any) -> Any:
    """What was cast to less, or lists of it, as it was before but where it is now."""
    if isinstance(before, list):
        return [_moved(*pair) for pair in zip(before, after, strict=True)]
    if not isinstance(before, Tensor) or torch.promote_types(before.dtype, after.dtype) == after.dtype:
        return after
    return before.to(after.device)


def keep_inputs(trainer: Trainer) -> None:
    """Have a Trainer's precision leave batches and the default precision alone.

    Lightning's casts all floating-point tensors of a batch (the weights of tokens, targets of a regression, margins),
    and has new tensors made in half precision inside of steps. Our networks cast what they take.
    """
    plugin: Any = trainer.precision_plugin
    plugin.convert_input = _unchanged
    if isinstance(trainer.precision_plugin, HalfPrecision):
        plugin.forward_context = nullcontext


def _unchanged(data: Any) -> Any:
    return data
