"""What reports over fixed records share: when they are made, their curves and files, and what a resume restores."""

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_alignment.callbacks.samples.html import CherryPick, render_report
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.files import naming, replaced
from lit_alignment.modules.base import alignment_module


class PickReport(Callback):
    """Show the same records to the model before training and at each validation, side by side in one report.

    Writes `cherry_picks.html` (self-contained) and `cherry_picks.jsonl` into the run's folder, and a table to the
    loggers that take one.

    Args:
        sources: Where the records come from; the validation sources by default.
        num_samples: Take the first so many of them.
        batch_size: Records to show together.
        every_n_validations: At every n-th validation only.
        before_training: Also before the first step.
    """

    right = "exact matches"  # what is counted where a record has been met

    def __init__(
        self,
        sources: list[SourceConfig] | None,
        num_samples: int,
        batch_size: int,
        every_n_validations: int,
        before_training: bool,
    ) -> None:
        """Records are read when the fit starts."""
        self.sources, self.num_samples, self.batch_size = sources, num_samples, batch_size
        self.every_n_validations, self.before_training = every_n_validations, before_training
        self.picks: list[CherryPick] = []
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.items: list[Any] = []
        self._validations = 0

    @abstractmethod
    def check(self, module: LightningModule) -> None:
        """Refuse a module that this report is not for.

        Raises:
            ConfigError: Saying which it is for.
        """

    @abstractmethod
    def known(self, item: Any) -> dict[str, str | None]:
        """What a record says beside its messages, by column."""

    @abstractmethod
    def show(self, trainer: Trainer, module: LightningModule, step: int) -> tuple[list[str], list[list[Any]]]:
        """Put what the model makes of the records into `picks`; headings and rows of the loggers' table.

        Every rank shows all records: sharded models hang if ranks make different numbers of calls.
        """

    def pictures(self, module: LightningModule) -> dict[str, str]:
        """Inline pictures for the report, by heading."""
        return {}

    def means(self) -> dict[str, float]:
        """Values for the loggers, by name."""
        return {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Encode the records."""
        if stage != "fit":
            return
        self.check(pl_module)
        datamodule = datamodule_of(trainer)
        if not (self.sources or datamodule.sources_of("val")):
            raise ConfigError(f"{type(self).__name__} has no prompts: give it sources, or give data.val.")
        items = datamodule.predict_items(self.sources) if self.sources else datamodule.validation_items()
        self.items = list(islice(items, self.num_samples))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the records before the first step."""
        if self.before_training and trainer.global_step == 0:
            self._report(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remember what of the training is drawn: the loss of each step, the rest where it was logged anew."""
        step, logged = trainer.global_step, trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        for name in _drawn(pl_module):
            value = trainer.callback_metrics.get(f"train/{name}") if logged or name == "loss" else None
            points = self.curves.setdefault(f"train/{name}", []) if value is not None else []
            if value is not None and step > (points[-1][0] if points else 0):
                points.append((step, float(value)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the records, and write the report."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        for name in _drawn(pl_module):
            value = float(trainer.callback_metrics.get(f"val/{name}", math.nan))
            if math.isfinite(value):
                self.curves.setdefault(f"val/{name}", []).append((trainer.global_step, value))
        if self._validations % self.every_n_validations == 0:
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        # Imported here: a logger's library takes a second to load.
        from lit_alignment.callbacks.samples.loggers import log_table

        step = trainer.global_step
        asked = [(item.dataset, item.id) for item in self.items]
        if [(pick.dataset, pick.id) for pick in self.picks] != asked:  # a first run, or resumed with other records
            self.picks = [self._pick(item) for item in self.items]
        columns, rows = self.show(trainer, module, step)
        directory = trainer.log_dir or trainer.default_root_dir
        if trainer.is_global_zero:
            self._write(Path(directory), step, module)
            log_table(trainer.loggers, "cherry_picks", columns, rows, step)
            # Every rank has all values, so nothing is gathered, and the other ranks are not waited for.
            for logger in trainer.loggers:
                logger.log_metrics(self.means(), step)

    def _pick(self, item: Item) -> CherryPick:
        return CherryPick(item.dataset, item.id, item.messages, self.known(item))

    def _write(self, directory: Path, step: int, module: LightningModule) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        lines = directory / "cherry_picks.jsonl"
        with naming(lines), lines.open("a", encoding="utf-8") as file:
            for pick in self.picks:
                line: dict[str, Any] = {
                    "step": step,
                    "dataset": pick.dataset,
                    "id": pick.id,
                    "messages": pick.messages,
                    **pick.known,
                    "answer": pick.answers[step],
                    "scores": pick.scores[step],
                }
                if step in pick.documents:
                    line["documents"] = pick.documents[step]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        with replaced(directory / "cherry_picks.html") as file:
            method = alignment_module(module)
            charts = [self._chart(names) for names in method.charts]
            pictures, notable = self.pictures(module), method.notable()
            file.write(render_report(directory.name, charts, self.picks, self.right, pictures, notable))

    def _chart(self, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
        """The curves of some quantities, in training and in validation."""
        wanted = [f"{stage}/{name}" for stage in ("train", "val") for name in names]
        return {name: self.curves[name] for name in wanted if name in self.curves}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue the same report."""
        return {
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
            "picks": [vars(pick) for pick in self.picks],
            "validations": self._validations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's report."""
        self.curves = {name: [(int(s), float(v)) for s, v in points] for name, points in state_dict["curves"].items()}
        self.picks = [CherryPick(**pick) for pick in state_dict["picks"]]
        self._validations = state_dict["validations"]


def _drawn(module: LightningModule) -> list[str]:
    """Names of what is drawn."""
    return [name for chart in alignment_module(module).charts for name in chart]
