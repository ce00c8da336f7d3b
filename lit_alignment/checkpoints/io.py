"""Checkpoints that a kill at any moment leaves whole: written beside, flushed to the disk, then renamed."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from lit_alignment.checkpoints.background import Queued, SaveQueue
from lit_alignment.checkpoints.reading import is_deepspeed, read_deepspeed, read_plain
from lit_alignment.checkpoints.sharded import cannot_save, found_path, is_sharded, partial_path, read_whole, swap
from lit_alignment.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's torch checkpoints, each appearing under its name only when it is complete.

    Loading reads weights and plain values only (`weights_only=True`): no code in a checkpoint is run.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: If the disk is full or the folder cannot be written; what was there before stays.
        """
        path = Path(path)
        unfinished = partial_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, unfinished)  # by its path: into a file of Python's, Ctrl-C ends the process at once
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            swap(unfinished, path)
        except (OSError, RuntimeError) as error:  # torch reports a short write as a RuntimeError
            raise CheckpointError(cannot_save(path, error)) from error
        finally:
            unfinished.unlink(missing_ok=True)  # there only after an error or Ctrl-C

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; one in shards as if one process had written it.

        Raises:
            CheckpointError: If the file is damaged or holds more than weights and plain values.
        """
        path = found_path(Path(path))
        if is_sharded(path):
            return read_whole(path)
        if is_deepspeed(path):
            return read_deepspeed(path)
        return read_plain(path)


class AsyncCheckpointIO(AtomicCheckpointIO, Queued):
    """The same, written by a thread while `fit` continues: training waits only until the weights are copied.

    At most one checkpoint is being written; the next save waits for it. An earlier checkpoint is removed when the new
    one is whole. For one process and DDP; FSDP2Strategy has `async_save`.
    """

    def __init__(self) -> None:
        """There is no thread before the fit starts, and none after it."""
        super().__init__()
        self.saves = SaveQueue(background=True)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy a checkpoint and begin to write the copy.

        Raises:
            CheckpointError: If the one before could not be written; what was there before stays.
        """
        self.saves.save(checkpoint, Path(path), partial(super().save_checkpoint, path=path))

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint once those that were saved before are whole."""
        self.saves.remove(Path(path), partial(super().remove_checkpoint, path))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, which can be the one that is being written."""
        self.saves.wait()
        return super().load_checkpoint(path, map_location, weights_only)

    @override
    def teardown(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: If it could not be written; what was there before stays.
        """
        self.saves.close()
