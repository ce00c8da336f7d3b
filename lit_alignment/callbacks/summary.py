"""What a training says last: why it ended, its figures, where its files are, and the commands that come next."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info

from lit_alignment.callbacks.curves import read_all
from lit_alignment.callbacks.page import PAGE
from lit_alignment.callbacks.report import RunReport
from lit_alignment.data.base import datamodule_of
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.paths import shown

MOST_FIGURES = 6
FILES = (PAGE, "cherry_picks.jsonl", "config.yaml", "data_report.json")


class EndSummary(Callback):
    """Saves what ModelCheckpoint left out at the end of a training, and says how it ended and what comes next.

    A resumed training takes the patience of EarlyStopping from its settings; Lightning takes the checkpoint's, with
    which a training that has stopped early would stop again at its next validation, whatever is set.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the settings, before a checkpoint is read."""
        self._patience = [(stopper, stopper.patience) for stopper in _stoppers(trainer)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing has stopped this training yet."""
        for stopper, patience in self._patience:
            stopper.patience, stopper.stopping_reason = patience, EarlyStoppingReason.NOT_STOPPED

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step of an epoch that was cut short: behind this hook it counts as whole."""
        if _is_last_epoch(trainer):
            _save_last_step(trainer, trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step where only the end of a whole epoch has stopped the training, as EarlyStopping may."""
        _save_last_step(trainer, trainer.current_epoch - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it, when all checkpoints are written."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("\n".join([ending(trainer, why_ended(trainer)), *_next_commands(trainer, pl_module)]))


@dataclass(frozen=True)
class Kept:
    """Checkpoints that a training leaves.

    Args:
        newest: Of the last step; None where none was saved.
        best: By the metric of a ModelCheckpoint; None where none is measured.
        figure: That metric and its value, in words.
    """

    newest: Path | None
    best: Path | None
    figure: str


def kept_checkpoints(trainer: Trainer, saved: Path | None = None) -> Kept:
    """The newest and the best checkpoint that are there.

    Args:
        trainer: That has trained.
        saved: A checkpoint that is not one of ModelCheckpoint's, the newest.
    """
    savers = _savers(trainer)
    judge = next((saver for saver in savers if saver.monitor is not None and saver.best_model_score is not None), None)
    best, figure = None, ""
    if judge is not None and Path(judge.best_model_path).exists():
        best = Path(judge.best_model_path)
        step = re.search(r"step=(\d+)", best.name)
        figure = f"{judge.monitor} {float(judge.best_model_score or 0):.4g}{f' at step {step[1]}' if step else ''}"
    names = {name for saver in savers for name in (saver.best_model_path, saver.last_model_path, *saver.best_k_models)}
    files = [path for path in map(Path, names - {""}) if path.exists()]
    return Kept(saved or max(files, key=lambda path: path.stat().st_mtime_ns, default=None), best, figure)


def ending(trainer: Trainer, why: str, saved: Path | None = None) -> str:
    """A few lines: why training ended and where, its figures, its files, and the command that goes on.

    Args:
        trainer: That has trained.
        why: Without a full stop.
        saved: A checkpoint that is not one of ModelCheckpoint's.
    """
    epoch = max(trainer.current_epoch, trainer.fit_loop.epoch_progress.current.ready)  # counted from 1
    lines = [f"{why} (optimizer step {trainer.global_step}, epoch {epoch})."]
    if final := _final(trainer):
        lines.append(f"final: {final}")
    kept, folder = kept_checkpoints(trainer, saved), Path(trainer.log_dir or trainer.default_root_dir)
    if kept.best is not None:
        lines.append(f"best: {kept.figure}, {shown(kept.best)}")
    elif lowest := _lowest(trainer):
        lines.append(f"best: {lowest}")
    if kept.newest not in (None, kept.best, saved):
        lines.append(f"newest checkpoint: {shown(kept.newest)}")
    if kept.best is not None and (kept.best.parent / "export").exists():
        lines.append(f"export: {shown(kept.best.parent / 'export')}  (loads with from_pretrained)")
    if files := [name for name in FILES if (folder / name).is_file()]:
        lines.append(f"run: {shown(folder)}  ({', '.join(files)})")
    if kept.newest is not None:
        lines.append(f"To go on: {_to_go_on(trainer, kept.newest)}")
    elif _savers(trainer):
        lines.append("No checkpoint was saved.")
    return "\n".join(lines)


def why_ended(trainer: Trainer) -> str:
    """Why a training that was not interrupted is over."""
    if (stopper := _stopped_by(trainer)) is not None:
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


def _save_last_step(trainer: Trainer, epoch: int) -> None:
    """Save the last step, of the epoch with this index, where a saver keeps the newest and its newest is older."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for saver in _savers(trainer):
        if saver.monitor is None and saver._last_global_step_saved != trainer.global_step:
            candidates = saver._monitor_candidates(trainer) | {"epoch": torch.tensor(epoch)}
            saver._save_topk_checkpoint(trainer, candidates)
            saver._save_last_checkpoint(trainer, candidates)


def _is_last_epoch(trainer: Trainer) -> bool:
    epochs = trainer.max_epochs or -1
    return (
        trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step or 0 < epochs <= trainer.current_epoch + 1
    )


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]


def _stoppers(trainer: Trainer) -> list[EarlyStopping]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, EarlyStopping)]


def _stopped_by(trainer: Trainer) -> EarlyStopping | None:
    return next(
        (each for each in _stoppers(trainer) if each.stopping_reason is not EarlyStoppingReason.NOT_STOPPED), None
    )


def _final(trainer: Trainer) -> str:
    """The last loss of training, and what the last validation measured, in the order of the method's charts."""
    values = trainer.callback_metrics
    logged = [name for name in values if name == "train/loss" or name.startswith("val/")]
    module = trainer.lightning_module
    charts = module.charts if isinstance(module, AlignmentModule) else ()
    drawn = [f"val/{name}" for group in charts for name in group]
    first = [name for name in ("train/loss", *drawn) if name in logged]
    names = list(dict.fromkeys([*first, *logged]))[:MOST_FIGURES]
    numbers = read_all([values[name] for name in names])
    return ", ".join(f"{name} {number:.4g}" for name, number in zip(names, numbers, strict=True))


def _lowest(trainer: Trainer) -> str:
    """The lowest loss of validation, where no checkpoint was chosen by a metric and later ones were higher."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    report = next((each for each in callbacks if isinstance(each, RunReport)), None)
    points = report.curves.get("val/loss", []) if report is not None else []
    step, value = min(points, key=lambda point: point[1], default=(0, 0.0))
    if not points or step == points[-1][0]:
        return ""
    return f"val/loss {value:.4g} at step {step}, not kept (ModelCheckpoint with monitor: val/loss keeps it)"


def _next_commands(trainer: Trainer, module: LightningModule) -> list[str]:
    """What can be done with the best checkpoint, or the newest, one command a line."""
    kept = kept_checkpoints(trainer)
    checkpoint = kept.best or kept.newest
    if checkpoint is None or not isinstance(module, AlignmentModule):
        return []
    asked = "" if datamodule_of(trainer).sources["predict"] else " --data.predict '[{path: FILE.jsonl}]'"
    lines = [f"{_command('predict', trainer, checkpoint)}{asked}"]
    if _answers(module):
        lines.append(f"lit-alignment chat {shown(checkpoint)}{_index_of(module)}")
    merges = module.peft_config is not None and not module.peft_config.is_prompt_learning
    if merges or not (checkpoint.parent / "export").exists():
        lines.append(f"lit-alignment {'merge' if merges else 'export'} {shown(checkpoint)} --out FOLDER")
    return ["Next:", *(f"  {line}" for line in lines)]


def _index_of(module: AlignmentModule) -> str:
    """The index that a module with retrieved passages answers from, as an option; a refreshed one has several."""
    retriever = module.passage_retriever
    if retriever is None:
        return ""
    return f" --index {'FOLDER' if retriever.refreshed else shown(Path(retriever.index_config.path))}"


def _answers(module: AlignmentModule) -> bool:
    try:
        module.respond([], DecodingConfig())
    except ConfigError:
        return False
    return True


def _to_go_on(trainer: Trainer, newest: Path) -> str:
    """The command that resumes from the newest checkpoint, behind what EarlyStopping needs for it to be of use."""
    command, stopper = f"{_command('fit', trainer, newest)}{_raised(trainer)}", _stopped_by(trainer)
    if stopper is None:
        return command
    match stopper.stopping_reason:
        case EarlyStoppingReason.PATIENCE_EXHAUSTED:
            needed = f"raise EarlyStopping's patience ({stopper.patience})"
        case EarlyStoppingReason.STOPPING_THRESHOLD:
            needed = f"change or remove EarlyStopping's stopping_threshold ({stopper.stopping_threshold})"
        case _:
            return "start anew, or from an earlier checkpoint, with a lower learning rate or other data"
    return f"{needed} in {_config(trainer) or 'the configuration'}, then {command}"


def _config(trainer: Trainer) -> str:
    """The run's configuration as a word of a command; empty where it has none."""
    config = Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"
    return shown(config) if config.is_file() else ""


def _command(name: str, trainer: Trainer, checkpoint: Path) -> str:
    # `newest` could be another run's
    return f"lit-alignment {name} --config {_config(trainer) or '...'} --ckpt_path {shown(checkpoint)}"


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
