"""Checkpoints written while training continues: one thread saves, links and removes them in the order asked for."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_alignment.checkpoints.sharded import partial_path
from lit_alignment.errors import ConfigError

REQUEUED = "hpc_ckpt"  # what Lightning saves just before it has SLURM end the job


class SaveQueue:
    """Does what it is given one after the other: in a thread between `start` and `close`, at once otherwise.

    After an error nothing more is done until the error was raised, so that what a save was to replace stays if that
    save fails. There is at most one save in it, and so one copy of the weights.

    Args:
        background: Whether there is to be a thread.
    """

    def __init__(self, background: bool) -> None:
        """There is no thread yet."""
        self.background = background
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._error: BaseException | None = None
        self._promised: dict[str, bool] = {}  # whether a path is there once the jobs are done

    def start(self) -> None:
        """Work in the background from now on, if that is wanted."""
        if self.background and self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")

    def save(self, checkpoint: dict[str, Any], path: Path, write: Callable[[dict[str, Any]], None]) -> None:
        """Wait for an earlier save, copy the checkpoint and write the copy.

        Args:
            checkpoint: It can be changed as soon as this returns.
            path: Where it will be.
            write: Writes one.

        Raises:
            CheckpointError: If an earlier save has failed.
        """
        self.wait()
        if self._thread is None or path.name.startswith(REQUEUED):
            write(checkpoint)
        else:
            self._promised[os.path.abspath(path)] = True
            self.then(partial(write, snapshot(checkpoint)))

    def remove(self, path: Path, remove: Callable[[], None]) -> None:
        """Remove a checkpoint once everything before is done."""
        self._promised[os.path.abspath(path)] = False
        self.then(remove)

    def link(self, path: Path, link: Path) -> None:
        """Make `link` point to a checkpoint once everything before is done."""
        self._promised[os.path.abspath(link)] = True
        self.then(partial(point, link, path))

    def then(self, work: Callable[[], None]) -> None:
        """Do something once everything before is done."""
        if self._thread is None:
            self._promised.clear()
            work()
        else:
            self._jobs = [job for job in self._jobs if not job.done()]
            self._jobs.append(self._thread.submit(self._do, work))

    def exists(self, path: Path) -> bool:
        """Whether something is at a path, or not, once everything before is done."""
        return self._promised.get(os.path.abspath(path), path.exists())

    def settle(self) -> None:
        """Wait until everything is done; an error is kept for `wait`."""
        for job in list(self._jobs):
            job.result()

    def wait(self) -> None:
        """Wait until everything is done.

        Raises:
            CheckpointError: If a save has failed since the last call.
        """
        self.settle()
        self._jobs.clear()
        self._promised.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _do(self, work: Callable[[], None]) -> None:
        if self._error is None:
            try:
                work()
            except BaseException as error:  # raised by `wait`, whatever it is
                self._error = error


class Queued:
    """A strategy or checkpoint plugin whose checkpoints go through a queue."""

    saves: SaveQueue


def save_queue(trainer: Trainer) -> SaveQueue:
    """What writes a Trainer's checkpoints; an empty queue if they are written at once."""
    for part in (trainer.strategy, trainer.strategy.checkpoint_io):
        if isinstance(part, Queued):
            return part.saves
    return SaveQueue(background=False)


def wait_for_saves(trainer: Trainer) -> None:
    """Wait until all checkpoints that were saved are on the disk: call it before you read one during `fit`.

    Raises:
        CheckpointError: If one could not be written.
    """
    save_queue(trainer).wait()


def start_saving(trainer: Trainer) -> None:
    """Let a Trainer save in the background, if it is to, until its strategy is torn down; called when a fit starts.

    ModelCheckpoint looks for files and makes links by itself; it is given the queue's view of what there is.

    Raises:
        ConfigError: If a plugin is to do what the strategy does itself.
    """
    if isinstance(trainer.strategy, Queued | DeepSpeedStrategy) and isinstance(trainer.strategy.checkpoint_io, Queued):
        raise ConfigError(
            "trainer.plugins: AsyncCheckpointIO is for one process and for DDP. Leave it out: DeepSpeed saves at once, "
            "and with FSDP2Strategy set trainer.strategy.init_args.async_save: true."
        )
    saves = save_queue(trainer)
    if saves.background:
        saves.start()
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint):
                saver.file_exists = partial(_file_exists, saves)  # type: ignore[method-assign]
                saver._link_checkpoint = partial(_link_checkpoint, saves)  # type: ignore[method-assign]


def _file_exists(saves: SaveQueue, filepath: str | Path, trainer: Trainer) -> bool:
    found = trainer.is_global_zero and saves.exists(Path(filepath))
    return trainer.strategy.reduce_boolean_decision(found, all=False)


def _link_checkpoint(saves: SaveQueue, trainer: Trainer, filepath: str, linkpath: str) -> None:
    if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
        saves.link(Path(filepath), Path(linkpath))
    trainer.strategy.barrier()


def point(link: Path, target: Path) -> None:
    """Make `link` a link to a file or folder, in one step."""
    fresh = partial_path(link)
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    os.replace(fresh, link)


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in the memory of the host; tensors that share their numbers share them in it too.

    From a GPU all copies are under way at once, into pinned memory, which PyTorch keeps for the next time.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            copies[key] = host.copy_(tensor.detach(), non_blocking=True)
        return copies[key]

    copied: dict[str, Any] = apply_to_collection(checkpoint, torch.Tensor, copy)
    if any(device.type == "cuda" for device, *_ in copies):
        torch.cuda.synchronize()
    return copied
