"""What held the memory of a GPU: a record of its allocations."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_alignment.errors import ConfigError, writing

MAX_ENTRIES = 200_000  # allocations and releases that are kept, the last ones; each takes about a kilobyte of the file


class MemorySnapshot(Callback):
    """Record the allocations of a training on GPUs from before its model is loaded, and write them into a file.

    The page pytorch.org/memory_viz shows what each took, and the line that asked for it. The file is written after some
    optimizer steps, or where the training ends before, as when the memory is used up.

    Args:
        path: The file; processes beside the first add their rank to its name.
        num_steps: Optimizer steps that are recorded.

    Raises:
        ConfigError: If `num_steps` is no positive number.
    """

    def __init__(self, path: str = "memory_snapshot.pickle", num_steps: int = 3) -> None:
        """Nothing is recorded yet."""
        if num_steps < 1:
            raise ConfigError(f"MemorySnapshot.num_steps is {num_steps}; use 1 or more.")
        self.path, self.num_steps = Path(path).expanduser(), num_steps
        self._last: int | None = None  # optimizer step after which it is written, while something is recorded

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to record.

        Raises:
            ConfigError: If the training is on no CUDA GPU, whose allocator alone keeps a record.
        """
        if stage != "fit":
            return
        if (device := trainer.strategy.root_device).type != "cuda":
            raise ConfigError(
                f"lit_alignment.MemorySnapshot: records allocations on a CUDA GPU, and this run is on {device}. Leave "
                "the callback out; `lit-alignment estimate` tells what each part of a step takes."
            )
        if trainer.global_rank > 0:
            self.path = self.path.with_stem(f"{self.path.stem}-{trainer.global_rank}")
        torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
        self._last = self.num_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where a resumed training stands."""
        if self._last is not None:
            self._last = trainer.global_step + self.num_steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Write, once enough steps are recorded."""
        if self._last is not None and trainer.global_step >= self._last:
            self._write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what led to an error."""
        self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what a short training has recorded."""
        self._write()

    def _write(self) -> None:
        """Write the record and end it, once."""
        if self._last is None:
            return
        self._last = None
        try:
            with writing(self.path, ConfigError, "Set another path of MemorySnapshot"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(self.path))  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
