"""Averages of weights: of Lightning's callbacks, over what trains alone, and of an optimizer."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lit_alignment.optimizers.schedule_free import ScheduleFreeAdamW


class _Weights(nn.Module):
    """The parameters and buffers of a module in its order: own ones in place of those that train."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.live = [module]  # not a part of this one
        self.own = {
            name: nn.Parameter(parameter.detach().to(device, copy=True), requires_grad=False)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for name, parameter in self.live[0].named_parameters():
            yield self.own.get(name, parameter)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        yield from self.live[0].buffers()


class TrainedAverage(AveragedModel):
    """The average that a callback keeps, of the weights that train; all others are the module's own.

    torch's averages a copy of the whole module: a frozen weight then drifts by rounding, and is held and saved twice.

    Args:
        module: What trains.
        average: The callback's own, which says how to average.
    """

    def __init__(self, module: LightningModule, average: AveragedModel) -> None:
        """Begin with the weights as they are."""
        nn.Module.__init__(self)
        number: Any = average.n_averaged
        self.module = _Weights(module, number.device)
        self.register_buffer("n_averaged", number)
        self.avg_fn, self.multi_avg_fn, self.use_buffers = average.avg_fn, average.multi_avg_fn, False
        self.is_live = False  # whether the module has the average now, and this the module's weights

    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Let the module and the average change their weights."""
        own = self.own
        for name, parameter in module.named_parameters():
            if name in own:
                live = parameter.detach().to(own[name].device, copy=True)
                parameter.copy_(own[name])
                own[name].copy_(live)
        self.is_live = not self.is_live

    @property
    def own(self) -> dict[str, Tensor]:
        """The averages by name."""
        weights: Any = self.module
        own: dict[str, Tensor] = weights.own
        return own

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take another step's weights in."""
        own = self.own
        live = {name: p.detach().to(own[name].device) for name, p in model.named_parameters() if name in own}
        number: Any = self.n_averaged
        if number == 0:
            for name, value in live.items():
                own[name].copy_(value)
        elif self.multi_avg_fn is not None:
            self.multi_avg_fn(list(own.values()), [live[name] for name in own], number)
        else:
            for name, value in live.items():
                mean = own[name] + (value - own[name]) / (number + 1)
                own[name].copy_(mean if self.avg_fn is None else self.avg_fn(own[name], value, number))
        number += 1

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The averages, under the names that the callback expects."""
        return {f"module.{name}": value.detach() for name, value in self.own.items()} | {"n_averaged": self.n_averaged}

    def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
        """Go on from there."""
        with torch.no_grad():
            for name, own in self.own.items():
                own.copy_(state_dict[f"module.{name}"])
            number: Any = self.n_averaged
            number.copy_(state_dict["n_averaged"])


def average_what_trains(trainer: Trainer, module: LightningModule) -> list[WeightAveraging]:
    """Give each averaging callback such an average; called when these are set up.

    Returns:
        The callbacks.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
    for callback in found:
        if callback._average_model is not None and not isinstance(callback._average_model, TrainedAverage):
            average = TrainedAverage(module, callback._average_model)
            hooks: Any = callback
            # At the end too: what is saved then still has both.
            hooks._average_model, hooks._swap_models, hooks._copy_average_to_current = average, *[average.exchange] * 2
    return found


def is_average_live(callbacks: list[WeightAveraging]) -> bool:
    """Whether the model has averaged weights now, and a callback the live ones."""
    averages = [callback._average_model for callback in callbacks]
    return any(isinstance(average, TrainedAverage) and average.is_live for average in averages)


def make_due_updates(callbacks: list[WeightAveraging], trainer: Trainer, module: LightningModule) -> None:
    """Take a step's weights in, where a checkpoint was saved between the step and that."""
    step = trainer.global_step
    for callback in callbacks:
        if step > callback._latest_update_step and callback.should_update(step_idx=step - 1):
            average: Any = callback._average_model
            average.update_parameters(module)
            callback._latest_update_step = step


class EvaluatedAverage:
    """Has a module evaluate, and its checkpoints hold, the weights that its optimizer averages, if it does.

    The weights that train are kept meanwhile, and come back to the bit.
    """

    def __init__(self) -> None:
        """The module has the weights that train."""
        self._live: dict[Tensor, Tensor] = {}

    def enter(self, optimizers: Iterable[Any]) -> None:
        """Give the module the averages, unless it has them."""
        if self._live:
            return
        with torch.no_grad():
            for parameter, average in _averages(optimizers).items():
                self._live[parameter] = parameter.detach().clone()
                parameter.copy_(average)

    @torch.no_grad()
    def leave(self) -> None:
        """Give the module the weights that train again."""
        for parameter, value in self._live.items():
            parameter.copy_(value)
        self._live = {}

    def save(self, module: LightningModule, checkpoint: dict[str, Any], live: str) -> None:
        """Put the averages into a checkpoint, and the weights that train beside them.

        Args:
            module: Whose checkpoint it is.
            checkpoint: With the module's weights as they are.
            live: Key of the weights that train.
        """
        others = self._live or _averages(module.trainer.optimizers)
        if not others:
            return
        weights = checkpoint["state_dict"]
        named = module.named_parameters(remove_duplicate=False)
        changed = weights | {name: others[each].detach() for name, each in named if name in weights and each in others}
        checkpoint["state_dict"], checkpoint[live] = (weights, changed) if self._live else (changed, weights)


def _averages(optimizers: Iterable[Any]) -> dict[Tensor, Tensor]:
    return {
        parameter: average
        for optimizer in optimizers
        if isinstance(optimizer, ScheduleFreeAdamW)
        for parameter, average in optimizer.averages().items()
    }
