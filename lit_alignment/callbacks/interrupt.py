"""Ctrl-C, SIGTERM and SLURM's signal end a run where it stands: saved, said, and with the exit code of the signal."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_alignment.callbacks.summary import ending
from lit_alignment.checkpoints.background import wait_for_saves
from lit_alignment.checkpoints.resuming import INTERRUPTED, REQUEUED
from lit_alignment.distributed.agreement import Agreement
from lit_alignment.errors import AlignmentError, Stopped

ONE_SIGNAL = 2.0  # seconds within which a launcher, a terminal and SLURM send the same one to a process


class Interrupt(Callback):
    """Stops a run that was asked to stop, and saves a training that ends by a signal or an error.

    A training stops before its next micro-batch, all ranks before the same one; a second signal stops it at once. What
    is no training stops at once: nothing is lost there. Python raises at whatever line runs when a signal arrives, in a
    destructor too, where exceptions are printed and forgotten: the run then stops at its next batch.
    """

    def __init__(self) -> None:
        """Nothing has come."""
        self.received: int | None = None
        self._at = 0.0
        self._previous: dict[int, Any] = {}
        self._requeue: int | None = None  # SLURM's signal
        self._training = False
        self._process = os.getpid()
        self._micro_batches = 0
        self._agreement: Agreement | None = None

    # Signals.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signals; only the main thread may."""
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return
        self._process = os.getpid()
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)
        for number in {signal.SIGINT, signal.SIGTERM, self._requeue} - {None}:
            self._previous[int(number)] = signal.signal(number, self._note)  # type: ignore[arg-type]
        # Lightning's own handlers wait for other ranks inside of a signal, and save where a step is half done.
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = _nothing

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals as they were; after an error the handlers stay, which raise what ends the process."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, and stop at once unless a training can stop in order."""
        if os.getpid() != self._process:  # a fork of it
            return
        again = self.received is not None and time.monotonic() - self._at > ONE_SIGNAL
        if self.received is None:
            self.received, self._at = number, time.monotonic()
        if again or not self._training:
            self._training = self._training and not again  # else it is saved, which takes time
            raise Stopped(number)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # past Python's buffers, which the signal may have found half written
            name = signal.Signals(number).name
            text = f"\n{name}: stopping before the next micro-batch; a second one stops at once, without saving.\n"
            os.write(2, text.encode())

    # Where a run stops.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save."""
        self._training, self._micro_batches = True, 0
        if trainer.world_size > 1:
            self._agreement = Agreement(trainer.global_rank, trainer.world_size, 1 + trainer.accumulate_grad_batches)
            loop: Any = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = _nothing  # waits for the device before every micro-batch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is saved."""
        self._training = False

    def on_train_batch_start(self, *args: Any) -> None:
        """Stop if a signal has come, to any rank.

        Raises:
            Stopped: On all ranks before the same micro-batch.
        """
        self._micro_batches += 1
        received = self.received
        if self._agreement is not None:
            received = self._agreement.stops(self._micro_batches, received)
        if received is not None:
            self.received = received
            raise Stopped(received)

    def on_validation_batch_start(self, *args: Any) -> None:
        """The same, in one process; several may have validated different numbers of batches."""
        self._stop()

    def on_test_batch_start(self, *args: Any) -> None:
        """The same."""
        self._stop()

    def on_predict_batch_start(self, *args: Any) -> None:
        """The same."""
        self._stop()

    def _stop(self) -> None:
        if self.received is not None and not (self._training and self._agreement is not None):
            raise Stopped(self.received)

    # What is left of it.

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a training where it stands: all ranks together if they have agreed to stop, else one process alone."""
        agreed = isinstance(exception, Stopped) and self._agreement is not None and self._agreement.reached
        if not self._training or not (agreed or trainer.world_size == 1):
            return
        self._training = False
        job = self._job() if isinstance(exception, Stopped) and exception.signal == self._requeue else None
        saved = _save(trainer, f"{REQUEUED}{job}" if job else INTERRUPTED)
        where = f"saved {saved}" if saved is not None else "not saved where it stands"
        note = ending(trainer, where, saved)
        if isinstance(exception, Stopped):
            exception.note = note
        else:
            rank_zero_info(f"ended by an error: {note}")
        if job is not None and saved is not None and trainer.is_global_zero:
            _requeue(job)

    def _job(self) -> str:
        return slurm_job() or ""


def slurm_job() -> str | None:
    """The number of this process's job, with that of the task in an array of jobs."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    name = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
    return name if name is not None and re.fullmatch(r"\d+(_\d+)?", name) else None


def _requeue(job: str) -> None:
    command = ["scontrol", "requeue", job]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        problem = result.stderr.strip() if result.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        rank_zero_warn(f"{' '.join(command)} failed ({problem}). Submit the job again with --ckpt_path newest.")
    else:
        rank_zero_info(f"requeued SLURM job {job}")


def _save(trainer: Trainer, stem: str) -> Path | None:
    """Save a training where it stands, beside its other checkpoints; None where it keeps none, or nothing was done."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    if not savers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    path = Path(str(savers[0].dirpath)) / f"{stem}.ckpt"
    try:
        wait_for_saves(trainer)  # what is being written may yet fail
        for saver in savers:
            if saver._last_global_step_saved == trainer.global_step and saver._last_checkpoint_saved:
                return Path(saver._last_checkpoint_saved)
        trainer.save_checkpoint(path, weights_only=False)
        wait_for_saves(trainer)
    except AlignmentError as error:  # a full disk, or the inside of an optimizer step
        rank_zero_info(str(error))
        return None
    return path


def _nothing() -> None:
    """Done by this callback."""
