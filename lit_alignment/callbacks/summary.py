"""Why a training ended, what was best, and how to go on."""

import re
import shlex
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info


class EndSummary(Callback):
    """Says at the end of a training why it ended."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it, when all checkpoints are written."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(ending(trainer, why_ended(trainer)))


def ending(trainer: Trainer, why: str, saved: Path | None = None) -> str:
    """One line: why training ended and where, the best checkpoint, and the command that goes on.

    Args:
        trainer: That has trained.
        why: Without a full stop.
        saved: A checkpoint that is not one of ModelCheckpoint's.
    """
    epoch = max(trainer.current_epoch, trainer.fit_loop.epoch_progress.current.ready)  # counted from 1
    parts = [f"{why} (optimizer step {trainer.global_step}, epoch {epoch})."]
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    judge = next((saver for saver in savers if saver.monitor is not None and saver.best_model_score is not None), None)
    if judge is not None and Path(judge.best_model_path).exists():
        step = re.search(r"step=(\d+)", Path(judge.best_model_path).name)
        at = f" at step {step[1]}" if step else ""
        parts.append(f"Best {judge.monitor}: {float(judge.best_model_score or 0):.4g}{at}, {judge.best_model_path}.")
    names = {name for saver in savers for name in (saver.best_model_path, saver.last_model_path, *saver.best_k_models)}
    kept = [path for path in map(Path, names - {""}) if path.exists()]
    newest = saved or max(kept, key=lambda path: path.stat().st_mtime_ns, default=None)
    config = Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"
    if newest is not None:
        file = shlex.quote(str(config)) if config.is_file() else "..."
        checkpoint = shlex.quote(str(newest))  # `newest` could be another run's
        parts.append(f"To go on: lit-alignment fit --config {file} --ckpt_path {checkpoint}{_raised(trainer)}")
    elif savers:
        parts.append("No checkpoint was saved.")
    return " ".join(parts)


def why_ended(trainer: Trainer) -> str:
    """Why a training that was not interrupted is over."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stopper = next((each for each in callbacks if isinstance(each, EarlyStopping) and each.stopped_epoch > 0), None)
    if stopper is not None:
        return f"early stopping: {stopper.stopping_reason_message or stopper.monitor}".rstrip(". ")
    if _timer(trainer) is not None:
        return "trainer.max_time is reached"
    for name, most in (("max_epochs", trainer.max_epochs), ("max_steps", trainer.max_steps)):
        if most == 0:
            return f"nothing was trained, as trainer.{name} is 0"
    if 0 < trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps: {trainer.max_steps} is reached"
    if trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch:
        return f"trainer.max_epochs: {trainer.max_epochs} is reached"
    return "training was stopped"


def _timer(trainer: Trainer) -> Timer | None:
    """What has ended a training whose time is over."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    timers = [each for each in callbacks if isinstance(each, Timer) and each._duration is not None]
    return next((each for each in timers if each.time_elapsed() >= float(each._duration or 0)), None)


def _raised(trainer: Trainer) -> str:
    """The option without which a resumed run would have nothing to do."""
    if (timer := _timer(trainer)) is not None:
        hours, rest = divmod(round(2 * float(timer._duration or 0)), 3600)
        return f" --trainer.max_time {hours // 24:02}:{hours % 24:02}:{rest // 60:02}:{rest % 60:02}"
    if 0 < trainer.max_steps <= trainer.global_step:
        return f" --trainer.max_steps {2 * trainer.max_steps}"
    if trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch:
        return f" --trainer.max_epochs {2 * trainer.max_epochs}"
    return ""
