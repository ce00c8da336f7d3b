"""What callbacks over fixed records share: when they look, their curves and files, and what a resume restores."""

import json
from abc import abstractmethod
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_alignment.callbacks.curves import Curves, drawn
from lit_alignment.callbacks.page import ReportPart, write_page
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.files import naming
from lit_alignment.report.run import CherryPick


class PickReport(ReportPart):
    """Show the same records to the model before training and at each validation, side by side in the run's page.

    Writes `report.html` (self-contained) and `cherry_picks.jsonl` into the run's folder, and a table to the loggers
    that take one.

    Args:
        sources: Where the records come from; the validation sources by default.
        num_samples: Take the first so many of them.
        batch_size: Records to show together.
        every_n_validations: At every n-th validation only.
        before_training: Also before the first step.
    """

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
        self.picks, self.curves = [], Curves()
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
        """Remember what of the training is drawn."""
        self.curves.note_step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the records, and write the report."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        self.curves.note_validation(trainer, drawn(pl_module))
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
            self._write(Path(directory), step)
            write_page(Path(directory), trainer, module)
            log_table(trainer.loggers, "cherry_picks", columns, rows, step)
            # Every rank has all values, so nothing is gathered, and the other ranks are not waited for.
            for logger in trainer.loggers:
                logger.log_metrics(self.means(), step)

    def _pick(self, item: Item) -> CherryPick:
        return CherryPick(item.dataset, item.id, item.messages, self.known(item))

    def _write(self, directory: Path, step: int) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue the same report."""
        return {
            "curves": self.curves.state_dict(),
            "picks": [vars(pick) for pick in self.picks],
            "validations": self._validations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's report."""
        self.curves.load_state_dict(state_dict["curves"])
        self.picks = [CherryPick(**pick) for pick in state_dict["picks"]]
        self._validations = state_dict["validations"]
