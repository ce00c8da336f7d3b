"""The folder of a run, which belongs to no other one."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_alignment.errors import ConfigError, writing

FIX = "Free its disk, or set trainer.default_root_dir, or the logger's save_dir, to a folder that can be written"


class RunFolder(Callback):
    """Makes the folder `version_N` of the loggers that count their runs, with the first N that is free.

    Lightning takes the number behind the last folder that it sees, so that runs which start together share one.
    """

    def __init__(self) -> None:
        """Nothing is taken."""
        self._taken: dict[Path, int] = {}  # numbers by the folder of all runs

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

    def leave(self) -> None:
        """Remove folders in which nothing was written, as the run did not begin."""
        for root, number in self._taken.items():
            with suppress(OSError):  # it holds something
                (root / f"version_{number}").rmdir()


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
