"""Curves of a training, for reports: points over optimizer steps, which a resume takes up again."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_alignment.modules.base import alignment_module

Points = list[tuple[int, float]]
MOST = 1000  # points of a curve: more than a picture shows, and a checkpoint stays small


class Curves(dict[str, Points]):
    """Points (optimizer step, value) by the name under which a value is logged.

    A curve that grows past MOST points keeps every other one, so that it spans the whole run at any length.
    """

    def __init__(self) -> None:
        """No points."""
        super().__init__()
        self._pending: list[tuple[str, int, Tensor]] = []

    def note_step(self, trainer: Trainer, module: LightningModule, others: Sequence[str] = ()) -> None:
        """Remember what was logged of training: the loss of about a hundred steps of each order, the rest when logged.

        Values stay on their device until `settle`: reading one waits for all that is queued there.

        Args:
            trainer: At the end of a micro-batch.
            module: Names what reports draw (`charts`).
            others: Further names, without `train/`.
        """
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged, early = step % max(1, every) == 0, step % 10 ** max(0, len(str(step)) - 2) == 0
        if not logged and not early:
            return
        values = logged_in_step(trainer)
        for name in (*drawn(module), *others):
            if (logged or name == "loss") and (value := values.get(f"train/{name}")) is not None:
                self._pending.append((f"train/{name}", step, value.detach().clone()))
        if len(self._pending) >= MOST:
            self.settle()

    def settle(self) -> None:
        """Read all values at once; call it before the curves are looked at."""
        pending, self._pending = self._pending, []
        numbers = read_all([value for _, _, value in pending])
        for (name, step, _), number in zip(pending, numbers, strict=True):
            self.add(name, step, number)

    def note_validation(self, trainer: Trainer, names: Sequence[str]) -> None:
        """Remember what a validation has logged, by names without `val/`."""
        self.settle()
        values = {f"val/{name}": trainer.callback_metrics.get(f"val/{name}") for name in names}
        measured = {name: value for name, value in values.items() if value is not None}
        for name, number in zip(measured, read_all([*measured.values()]), strict=True):
            self.add(name, trainer.global_step, number)

    def add(self, name: str, step: int, value: float) -> None:
        """Add a point, unless it is non-finite, or the curve has one of this step or a later one."""
        points = self.get(name, [])
        if not math.isfinite(value) or step <= (points[-1][0] if points else 0):
            return
        points.append((step, value))
        self[name] = points[::-2][::-1] if len(points) > MOST else points  # the last one stays

    def charts(self, groups: Sequence[Sequence[str]]) -> list[dict[str, Points]]:
        """The curves of each group of names, in training and in validation."""
        wanted = [[f"{stage}/{name}" for stage in ("train", "val") for name in group] for group in groups]
        return [{name: self[name] for name in names if name in self} for names in wanted]

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Plain values for a checkpoint."""
        self.settle()
        return {name: [list(point) for point in points] for name, points in self.items()}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        """Take up the curves of an earlier run."""
        self.clear()
        self._pending.clear()
        self.update({name: [(int(step), float(value)) for step, value in points] for name, points in state.items()})


def drawn(module: LightningModule) -> list[str]:
    """Names of what the reports of a method draw, without their stage."""
    return [name for chart in alignment_module(module).charts for name in chart]


def read_all(values: Sequence[Tensor]) -> list[float]:
    """The numbers of scalars, for which their device is waited for once."""
    return torch.stack([value.double() for value in values]).tolist() if values else []


def logged_in_step(trainer: Trainer) -> dict[str, Tensor]:
    """What was logged in this step, by name, on its device; `callback_metrics` would read what the bar shows."""
    results: Any = trainer._results or {}
    return {each.meta.name: each._forward_cache for each in results.values() if each._forward_cache is not None}
