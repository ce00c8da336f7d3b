"""Settings of the Trainer that would train nothing, or something else than they say: refused by name, at the start."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging

from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.distributed.features import features_of
from lit_alignment.errors import ConfigError


def check_trainer(trainer: Trainer, data: AlignmentDataModule, averages_itself: bool = False) -> None:
    """Refuse what cannot be trained as it is asked for.

    Args:
        trainer: About to fit.
        data: Set up.
        averages_itself: Whether the optimizer averages the weights.

    Raises:
        ConfigError: Naming the setting, and what it may be.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; use 1 or more.")
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise ConfigError(f"trainer.gradient_clip_val is {trainer.gradient_clip_val}; use 0 for none, or more.")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if data.stream is not None:
        check_streaming(trainer, "val" in data.examples)
    batches = data.epoch_length(data.begun.epoch)
    if batches < 1:
        raise ConfigError(
            f"trainer.limit_train_batches is {trainer.limit_train_batches}, which is less than one batch. Give a "
            "number of batches, or a larger share."
        )
    interval = trainer.val_check_interval
    if not interval:
        raise ConfigError("trainer.val_check_interval is 0; use a number of batches, or a share of an epoch.")
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and "val" in data.examples:
        if interval > batches:
            raise ConfigError(
                f"trainer.val_check_interval is {interval}, and an epoch has {batches} batches. Lower it, or set "
                "trainer.check_val_every_n_epoch to null, which counts the batches of all epochs."
            )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)
    if averages and not features_of(trainer.strategy).supports("whole_weights"):
        raise ConfigError("weights in shards cannot be averaged: remove the averaging callback, or use DDP.")
    if averages and averages_itself:
        raise ConfigError(
            "optimizer.algorithm: ScheduleFreeAdamW averages the weights, and so does a callback. Remove one of them."
        )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ConfigError(
            "StochasticWeightAveraging averages copies of a whole module, frozen weights included, under a schedule of "
            "its own. Use lightning.pytorch.callbacks.EMAWeightAveraging."
        )


def check_streaming(trainer: Trainer, validates: bool) -> None:
    """Refuse what needs the end of an epoch, where the training data are streamed.

    Args:
        trainer: About to fit.
        validates: Whether there is something to validate on.

    Raises:
        ConfigError: Naming the setting, and what it may be.
    """
    why = "data.streaming is true, and an epoch of streamed data has no end"
    if trainer.max_steps < 0:
        raise ConfigError(f"{why}: set trainer.max_steps.")
    if trainer.max_epochs not in (None, -1):
        raise ConfigError(f"{why}: leave trainer.max_epochs (it is {trainer.max_epochs}) out; max_steps ends the run.")
    if trainer.limit_train_batches != 1.0 or trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ConfigError(f"{why}: leave trainer.limit_train_batches and overfit_batches out; set trainer.max_steps.")
    if validates and not isinstance(trainer.val_check_interval, int):
        raise ConfigError(
            f"{why}: set trainer.val_check_interval to a number of batches (it is {trainer.val_check_interval})."
        )
