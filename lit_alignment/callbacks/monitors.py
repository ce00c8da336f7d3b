"""Metrics that callbacks watch, checked as soon as it is known what is logged."""

from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_alignment.errors import ConfigError
from lit_alignment.modules.base import AlignmentModule

COUNTED = ("epoch", "step")  # what ModelCheckpoint adds itself


class Monitors(Callback):
    """Refuses a `monitor` that nothing logs: after the sanity check or, without one, the first step or validation.

    It stands before all other callbacks, which would end the run at their first look, often after an epoch.
    """

    def __init__(self) -> None:
        """Nothing is logged yet."""
        self._validated = self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse metrics of a validation that is switched off."""
        if not trainer.enable_validation:
            self._check_validation(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what validation logs."""
        self._check_validation(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what validation logs, unless the sanity check has shown it, and at what its records do not define.

        Raises:
            ConfigError: If a watched metric is not there.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        undefined = pl_module.undefined if isinstance(pl_module, AlignmentModule) else {}
        for owner, name in _watched(trainer):
            if name in undefined:
                raise ConfigError(
                    f"{owner}: monitor is '{name}', which needs {undefined[name]} and data.val has none. Validate on "
                    "such records, or watch val/loss."
                )
        self._check_validation(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Look at what the first optimizer step logs; other metrics of training may come later.

        Raises:
            ConfigError: If a watched metric is not there and is nearly one that is.
        """
        if self._trained or trainer.global_step == 0:
            return
        self._trained = True
        known = set(map(str, trainer.callback_metrics))
        for owner, name in _watched(trainer):
            if name.startswith("train/") and name not in known and get_close_matches(name, known, n=1, cutoff=0.8):
                raise ConfigError(_message(owner, name, known))

    def _check_validation(self, trainer: Trainer, module: LightningModule) -> None:
        if self._validated:
            return
        self._validated = True
        known = set(map(str, trainer.callback_metrics))
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Of other packages nobody knows what they log, and when.
        all_known = all(
            type(each).__module__.startswith(("lit_alignment.", "lightning.")) for each in (module, *callbacks)
        )
        for owner, name in _watched(trainer):
            if name in known or name in COUNTED or name.startswith("train/"):
                continue
            if name.startswith("val/") or all_known:
                raise ConfigError(_message(owner, name, known))


def _watched(trainer: Trainer) -> list[tuple[str, str]]:
    """Class and `monitor` of each callback that has one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [(type(each).__name__, vars(each).get("monitor")) for each in callbacks]
    return [(owner, name) for owner, name in found if isinstance(name, str)]


def _message(owner: str, name: str, known: set[str]) -> str:
    if not known:
        return f"{owner}: monitor is '{name}', and nothing is validated. Give data.val, or watch train/loss."
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'?" if close else f"Logged are {', '.join(sorted(known))}."
    return f"{owner}: monitor is '{name}', which is not logged. {hint}"
