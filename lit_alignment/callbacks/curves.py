"""Curves of a training, for reports: points over optimizer steps, which a resume takes up again."""

import math
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from lit_alignment.modules.base import alignment_module

Points = list[tuple[int, float]]
MOST = 1000  # points of a curve: more than a picture shows, and a checkpoint stays small


class Curves(dict[str, Points]):
    """Points (optimizer step, value) by the name under which a value is logged.

    A curve that grows past MOST points keeps every other one, so that it spans the whole run at any length.
    """

    def note_step(self, trainer: Trainer, module: LightningModule, others: Sequence[str] = ()) -> None:
        """Remember what was logged of training: the loss of about a hundred steps of each order, the rest when logged.

        Reading a value waits for the device, so that not every step is read.

        Args:
            trainer: At the end of a micro-batch.
            module: Names what reports draw (`charts`).
            others: Further names, without `train/`.
        """
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged, early = step % max(1, every) == 0, step % 10 ** max(0, len(str(step)) - 2) == 0
        if not logged and not early:
            return
        values = trainer.callback_metrics
        for name in (*drawn(module), *others):
            if (logged or name == "loss") and f"train/{name}" in values:
                self.add(f"train/{name}", step, float(values[f"train/{name}"]))

    def note_validation(self, trainer: Trainer, names: Sequence[str]) -> None:
        """Remember what a validation has logged, by names without `val/`."""
        values = trainer.callback_metrics
        for name in names:
            if f"val/{name}" in values:
                self.add(f"val/{name}", trainer.global_step, float(values[f"val/{name}"]))

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
        return {name: [list(point) for point in points] for name, points in self.items()}

    def load_state_dict(self, state: dict[str, list[list[float]]]) -> None:
        """Take up the curves of an earlier run."""
        self.clear()
        self.update({name: [(int(step), float(value)) for step, value in points] for name, points in state.items()})


def drawn(module: LightningModule) -> list[str]:
    """Names of what the reports of a method draw, without their stage."""
    return [name for chart in alignment_module(module).charts for name in chart]
