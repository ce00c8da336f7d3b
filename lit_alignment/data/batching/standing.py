"""Where a training stands: behind its last optimizer step, whoever saves it and whenever.

A checkpoint can be asked for at any moment: inside of an accumulation window, in a validation, at an exception. The
weights are then those of the last optimizer step, so the counters say that too, and a resume computes the open window
again. Random numbers are drawn anew for each step, so that they too are what they were.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lit_alignment.errors import CheckpointError

NO_METRIC = (None, "step", "epoch")  # what checkpoints are ranked by that need no validation


@dataclass(frozen=True)
class Standing:
    """The last optimizer step of a training.

    Args:
        epoch: The epoch of the next micro-batch.
        steps: Optimizer steps of this epoch.
        batches: Micro-batches that these used on each rank.
        ended: Whether Lightning still counts the epoch before, which is whole.
    """

    epoch: int
    steps: int
    batches: int
    ended: bool = False


def standing(trainer: Trainer) -> Standing:
    """Where a Trainer stands."""
    fit = trainer.fit_loop
    progress: Any = fit.epoch_progress.current
    if progress.ready > progress.started or progress.started == 0:  # the epoch is about to begin
        return Standing(progress.processed, 0, 0, ended=progress.started > 0)
    steps = fit.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current.completed
    batches = int(min(steps * trainer.accumulate_grad_batches, trainer.num_training_batches))
    if progress.processed == progress.started and batches >= trainer.num_training_batches:
        return Standing(progress.started, 0, 0, ended=True)
    return Standing(progress.started - 1, steps, batches)


def settle(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Make the counters of one of Lightning's checkpoints those behind the last optimizer step."""
    at = standing(trainer)
    write_standing(checkpoint, at, at.steps > 0 and at.batches == trainer.num_training_batches)


def write_standing(checkpoint: dict[str, Any], at: Standing, is_last: bool) -> None:
    """Put a standing into one of Lightning's checkpoints.

    Args:
        checkpoint: Whose counters are set.
        at: What they are to say.
        is_last: Whether that is the end of its epoch.
    """
    checkpoint["epoch"] = at.epoch
    fit = checkpoint["loops"]["fit_loop"]
    begun = at.epoch + int(at.steps > 0)
    _count(fit["epoch_progress"], {"ready": begun, "started": begun, "processed": at.epoch, "completed": at.epoch})
    batches = fit["epoch_loop.batch_progress"]
    behind = batches["current"]["ready"] if at.ended else 0  # of the epoch before, which the sum over epochs keeps
    _count(batches, dict.fromkeys(("ready", "started", "processed", "completed"), at.batches), behind)
    batches["is_last_batch"] = is_last
    optimization = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (optimization["step"], optimization["zero_grad"], fit["epoch_loop.scheduler_progress"]):
        for counts in progress.values():
            counts.update(dict.fromkeys(counts, counts["completed"]))
        if at.steps == 0:
            progress["current"].update(dict.fromkeys(progress["current"], 0))
    validation = fit["epoch_loop.val_loop.batch_progress"]
    validation["total"].update(dict.fromkeys(validation["total"], validation["total"]["completed"]))
    validation["current"].update(dict.fromkeys(validation["current"], 0))
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


def standing_of(checkpoint: dict[str, Any], batches: int) -> Standing:
    """Where a training stood whose checkpoint an earlier version wrote, between two optimizer steps.

    Args:
        checkpoint: One of Lightning's.
        batches: Micro-batches of its epoch that each rank had used.
    """
    fit = checkpoint["loops"]["fit_loop"]
    progress = fit["epoch_progress"]["current"]
    steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
    if progress["processed"] == progress["started"]:
        return Standing(progress["started"], 0, 0, ended=progress["started"] > 0)
    return Standing(progress["started"] - 1, steps, batches)


def _count(progress: dict[str, Any], current: dict[str, int], behind: int = 0) -> None:
    base = progress["total"]["ready"] - progress["current"]["ready"] + behind
    progress["current"].update(current)
    progress["total"].update({name: base + number for name, number in current.items()})


def recount(checkpoint: dict[str, Any], batches: int, accumulate: int) -> None:
    """Make the counts of a begun epoch those of another plan.

    Args:
        checkpoint: One of Lightning's.
        batches: Micro-batches that each rank would have used.
        accumulate: Micro-batches of an optimizer step.
    """
    fit = checkpoint["loops"]["fit_loop"]
    _count(fit["epoch_loop.batch_progress"], dict.fromkeys(("ready", "started", "processed", "completed"), batches))
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False
    steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]
    steps.update(dict.fromkeys(steps, batches // accumulate))


def accumulation(trainer: Trainer, epoch: int) -> int:
    """Micro-batches of an optimizer step in an epoch."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((each for each in callbacks if isinstance(each, GradientAccumulationScheduler)), None)
    return trainer.accumulate_grad_batches if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)


def total_steps(trainer: Trainer) -> float:
    """Optimizer steps of the whole run, those before a resume included; may be infinite."""
    most = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if trainer.max_epochs in (None, -1):
        return most
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    steps, begun = float(data.begun.global_step), data.begun
    for epoch in range(begun.epoch, trainer.max_epochs):
        done = begun.batches if epoch == begun.epoch else 0
        length = data.epoch_length(epoch)
        if math.isinf(length):
            return most
        steps += math.ceil((length - done) / accumulation(trainer, epoch))
        if steps >= most:
            return most
    return steps


def reload_loader(trainer: Trainer) -> None:
    """Make the training loader again, with the length that an epoch has now."""
    forget_loader(trainer)
    trainer.fit_loop.setup_data()


def forget_loader(trainer: Trainer) -> None:
    """Have the training loader made again at the beginning of the next epoch."""
    trainer.fit_loop._combined_loader = None


def catch_up(trainer: Trainer, validated: tuple[int, int] | None) -> None:
    """Do what was due where a resumed training stands: called when Lightning has counted, before its first batch.

    Args:
        trainer: Resumed.
        validated: Epoch and micro-batch behind which the last validation stood.
    """
    epochs: Any = trainer.fit_loop.epoch_loop
    epochs.__dict__.pop("_should_check_val_fx", None)  # of a training that has ended
    # A scheduler of it acts at the beginning of epochs alone.
    trainer.accumulate_grad_batches = accumulation(trainer, trainer.current_epoch)
    loop, at = trainer.fit_loop.epoch_loop, standing(trainer)
    fetcher: Any = trainer.fit_loop._data_fetcher
    looks = loop.restarting and loop._should_check_val_fx(fetcher)
    if looks and at.steps > 0 and validated != (at.epoch, at.batches):
        loop._batches_that_stepped = trainer.global_step - 1  # as a validation behind a step is logged
        loop.val_loop.restarting = False
        trainer.validating = True
        loop.val_loop.run()
        loop.val_loop._has_run = False  # else Lightning takes the next epoch for resumed too
        trainer.training = True
    # Lightning counts one more where it passes over a validation that it takes for done.
    loop._batches_that_stepped = trainer.global_step - int(looks)
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback._every_n_train_steps < 1:
            continue
        if callback.monitor in NO_METRIC:
            callback._last_global_step_saved = trainer.global_step  # it is there


def validate_last(trainer: Trainer) -> None:
    """Have a training that ends here validate, where that ranks its checkpoints; called at the end of a micro-batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    ends = 0 < trainer.max_steps <= trainer.global_step or trainer.should_stop
    monitors = [saver.monitor or "" for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    if ends and trainer.enable_validation and any(monitor.startswith("val/") for monitor in monitors):
        loop._should_check_val_fx = lambda fetcher: True


def skip_validation(trainer: Trainer, validated: tuple[int, int]) -> None:
    """Do not repeat a validation inside of a window that is computed again; called at the end of a micro-batch."""
    loop = trainer.fit_loop.epoch_loop
    if (trainer.current_epoch, loop.batch_progress.current.ready) <= validated:
        loop._skip_next_val = True


def seed_step(trainer: Trainer, rank: int) -> None:
    """Draw the random numbers of an optimizer step from its own seed.

    Args:
        trainer: At the first micro-batch of the step.
        rank: Whose batches this process has.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    (state,) = np.random.SeedSequence([seed, trainer.global_step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


def refuse_half_step(trainer: Trainer, stepping: bool) -> None:
    """Refuse to save weights of which some have made the step and others have not.

    Raises:
        CheckpointError: If the optimizer is at work.
    """
    step = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current
    if stepping and step.ready != step.completed:
        raise CheckpointError("not saved: the run stopped inside of an optimizer step. Earlier checkpoints stay.")
