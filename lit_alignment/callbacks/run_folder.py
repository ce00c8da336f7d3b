"""The folder of a run, which belongs to no other one, the configuration in it, and what is measured later."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_alignment.checkpoints.resuming import run_of
from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.errors import ConfigError, writing
from lit_alignment.files import naming
from lit_alignment.paths import shown
from lit_alignment.secrets import masked

# What a run writes before it has done anything; metrics of steps are in the loggers' files alone.
OF_A_START = ("config.yaml", "data_report.json", "hparams.yaml", "metrics.csv", "events.out.tfevents.*")
FIX = "Free its disk, or set trainer.default_root_dir, or the logger's save_dir, to a folder that can be written"


class MaskedConfig(SaveConfigCallback):
    """Writes the configuration of a run beside its results, without secrets."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it for a training; what decides predictions stands beside them, and other commands have no folder."""
        if stage != "fit":
            return
        self.config = masked(self.config)
        with naming(Path(trainer.log_dir or "") / self.config_filename):
            super().setup(trainer, pl_module, stage)


class RunFolder(Callback):
    """Makes the folder `version_N` of the loggers that count their runs, with the first N that is free.

    Lightning takes the number behind the last folder that it sees, so that runs which start together share one.
    """

    def __init__(self) -> None:
        """Nothing is taken."""
        self._taken: dict[Path, int] = {}  # numbers by the folder of all runs
        self._trained = False

    @contextmanager
    def taken(self, trainer: Trainer) -> Iterator[None]:
        """The folders for a run; they are removed if nothing was written in them, or nothing but what a start writes.

        Raises:
            ConfigError: If the disk is full or cannot be written.
        """
        self.take(trainer)
        try:
            yield
        except BaseException:
            self.leave(failed=True)
            raise
        self.leave(failed=False)

    def take(self, trainer: Trainer) -> None:
        """Make the folders, on one process; loggers of one name share one.

        Raises:
            ConfigError: If the disk is full or cannot be written.
        """
        for logger in _counting(trainer) if trainer.is_global_zero else []:
            root = Path(logger.root_dir)
            if logger._version is not None or "://" in logger.root_dir:
                continue
            if root not in self._taken:
                with writing(root, ConfigError, FIX):
                    self._taken[root] = _make(root, logger._get_next_version())
            logger._version = self._taken[root]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the other processes."""
        for logger in _counting(trainer):
            logger._version = trainer.strategy.broadcast(logger._version)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """From the first optimizer step on there is something to keep."""
        self._trained = self._trained or trainer.global_step > 0

    def leave(self, failed: bool) -> None:
        """Remove the folders of a run that wrote nothing, or that failed before it had done anything.

        Args:
            failed: Whether the run ended by an error.
        """
        for root, number in self._taken.items():
            folder = root / f"version_{number}"
            if failed and not self._trained and not any(map(_is_kept, folder.iterdir())):
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it holds something
                folder.rmdir()


def check_run_folder(trainer: Trainer) -> None:
    """Refuse a first logger that keeps nothing on this disk: reports and configuration would have no place."""
    first = trainer.loggers[0] if trainer.loggers else None
    if first is not None and first.save_dir is None and not isinstance(first, DummyLogger):
        raise ConfigError(
            f"trainer.logger: {type(first).__name__} gives the run no folder on this disk. "
            "Make it a list, with a TensorBoardLogger or CSVLogger first."
        )


def leave_no_folder(trainer: Trainer, data: AlignmentDataModule) -> None:
    """Take a Trainer that only measures the loggers that would make `version_N`, and with these the report on the data.

    Args:
        trainer: Of a validation or a test.
        data: Its data module.
    """
    counting = [logger for logger in _counting(trainer) if logger._version is None]
    trainer.loggers = [logger for logger in trainer.loggers if logger not in counting]
    data.writes_reports = bool(_counting(trainer))


def note_figures(command: str, trainer: Trainer, data: AlignmentDataModule, checkpoint: str | Path | None) -> None:
    """Add a line with what was measured to `validate.jsonl` or `test.jsonl` in the run of a checkpoint, if it has one.

    Args:
        command: `validate` or `test`.
        trainer: That has measured.
        data: Its data module.
        checkpoint: What was measured; None for the model as it is configured.

    Raises:
        ConfigError: If the disk is full or the folder cannot be written.
    """
    run = run_of(checkpoint)
    if run is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    line = {"checkpoint": Path(str(checkpoint)).name, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    reports = {split: vars(report) for split, report in data.reports.items()}
    path = run / f"{command}.jsonl"
    with writing(path, ConfigError, "Free its disk, or make it writable"), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "figures": figures, "data": reports}) + "\n")
    rank_zero_info(f"figures: {shown(path)}")


def _is_kept(path: Path) -> bool:
    return not any(path.match(pattern) for pattern in OF_A_START) and (path.is_file() or any(path.iterdir()))


def _counting(trainer: Trainer) -> list[Any]:
    loggers: list[Any] = trainer.loggers
    return [logger for logger in loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]


def _make(root: Path, number: int) -> int:
    """The first number from `number` on whose folder is not there, and was made."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            (root / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number
