"""Which checkpoint a command goes on from, and into which folder it writes then."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_alignment.checkpoints.newest import earlier_checkpoint, newest_checkpoint
from lit_alignment.checkpoints.reading import is_deepspeed
from lit_alignment.checkpoints.sharded import REST, is_sharded
from lit_alignment.data.batching.position import FROM_WEIGHTS
from lit_alignment.errors import AlignmentError, CheckpointError, ConfigError
from lit_alignment.files import conformed
from lit_alignment.paths import shown

NEWEST, LAST = "newest", "last"  # in place of a checkpoint's path
UNKNOWN = ("best", "hpc", "registry")  # Lightning's words, which mean nothing to a new process
INTERRUPTED = "interrupted"  # a training that a signal or an error has ended, where it stood
REQUEUED = "requeued-"  # and the number of its SLURM job, which begins anew
OF_A_RUN = ("metrics.csv", "config.yaml", "hparams.yaml")
KEPT = ("metrics.csv", "config.yaml")  # what a run would write anew


def find_checkpoint(word: str | None, trainer: Trainer, resumes: bool) -> str | None:
    """The checkpoint that a word stands for; any other path as it is.

    Args:
        word: `newest`, `last`, a path, or None.
        trainer: Says where checkpoints are kept.
        resumes: Whether a training goes on; with `newest` and no checkpoint it begins.

    Raises:
        ConfigError: If there is none.
    """
    if word in UNKNOWN:
        raise ConfigError(f"--ckpt_path {word}: give a checkpoint's path, {NEWEST} or {LAST}.")
    if word not in (NEWEST, LAST):
        if word:
            _check_folder(Path(word))
        return word
    names = {saver.CHECKPOINT_NAME_LAST for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)}
    stems = ["*"] if word == NEWEST else [f"{name}*" for name in names]
    found = next((path for stem in stems if (path := newest_checkpoint(trainer, stem)) is not None), None)
    if found is None and word == LAST:
        raise ConfigError(
            "--ckpt_path last: there is no last checkpoint where this run, or an earlier one of its name, keeps them. "
            "Set ModelCheckpoint's save_last: true before a run; or use newest, which starts anew where there is none."
        )
    if found is None and not resumes:
        raise ConfigError("--ckpt_path newest: there is no checkpoint that can be read.")
    what = "resuming from" if resumes else "checkpoint:"
    print(f"{what} {shown(found)}" if found else "no checkpoint yet: starting", flush=True)
    return None if found is None else str(found)


def say_earlier_run(trainer: Trainer) -> None:
    """Say, where a training begins anew, that one of its name is there, and how to go on with that."""
    found = None if trainer.fast_dev_run else earlier_checkpoint(trainer)  # type: ignore[attr-defined]
    if found is not None:
        rank_zero_info(
            f"An earlier run of this name has left {shown(found)}. This run starts anew; to go on with the earlier "
            "one, add --ckpt_path newest, and raise trainer.max_epochs or trainer.max_steps where it had reached that."
        )


def _check_folder(path: Path) -> None:
    """Refuse a folder that is no checkpoint, and say what it is.

    Raises:
        ConfigError: If it is none.
    """
    if not path.is_dir() or is_sharded(path) or is_deepspeed(path):
        return
    names = sorted(each.name for each in path.iterdir())
    within = [file for pattern in ("", "checkpoints/", "*/checkpoints/") for file in path.glob(f"{pattern}*.ckpt")]
    if within:
        fix = f"Give one of the checkpoints in it, such as {max(within, key=lambda file: file.stat().st_mtime)}"
    elif "adapter_config.json" in names:
        fix = "It holds an adapter: give it as model.adapter.path"
    elif "config.json" in names:
        fix = "It holds a model: give it as model.backbone.path"
    else:
        fix = f"It holds {', '.join(names[:4]) or 'nothing'}; give a .ckpt file, or a folder with .metadata and {REST}"
    raise ConfigError(f"--ckpt_path {path}: a folder that is no checkpoint. {fix}.")


# What restoring a value of the wrong form raises, somewhere inside of Lightning, torch or a callback.
MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class CheckpointConnector(_CheckpointConnector):
    """Restores what a command was given and nothing else, and says so where that has another form than this run."""

    _hpc_resume_path = None  # Lightning's name in the working folder, which any other run may have left there

    def _restore_modules_and_callbacks(self, *arguments: Any, **options: Any) -> None:
        with self._explained():
            super()._restore_modules_and_callbacks(*arguments, **options)

    def resume_start(self, *arguments: Any, **options: Any) -> None:
        """Read the checkpoint, and its counters as such."""
        super().resume_start(*arguments, **options)
        loops = self._get_loops_state_dict()
        loops["fit_loop"]["state_dict"] = {}  # of loaders
        self._conform({"epoch": 0, "global_step": 0, "loops": loops}, counts=True)

    def restore_callbacks(self) -> None:
        """States of callbacks, whose parts have the types of this run's own."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            stored = (self._loaded_checkpoint.get("callbacks") or {}).get(callback.state_key, {})
            for name, own in callback.state_dict().items():
                form = type(own)() if isinstance(own, dict | list) else own  # what is in them differs from run to run
                if name in stored and (stored[name] is not None or isinstance(own, int | float)):
                    conformed(stored[name], form, f"callbacks.{callback.state_key}.{name}")
        super().restore_callbacks()

    def restore_training_state(self) -> None:
        """Optimizers, loops and schedulers."""
        with self._explained():
            if self.trainer.state.fn == "fit":
                schedules = [each.scheduler.state_dict() for each in self.trainer.lr_scheduler_configs]
                groups = [
                    [{**group, "params": None, "param_names": None} for group in each.param_groups]
                    for each in self.trainer.optimizers
                ]
                optimizers = [{"state": {}, "param_groups": each} for each in groups]
                self._conform({"lr_schedulers": schedules, "optimizer_states": optimizers})
            super().restore_training_state()

    def _conform(self, own: dict[str, Any], counts: bool = False) -> None:
        """Take those parts of the checkpoint that are there in the form of this run's own."""
        checkpoint = self._loaded_checkpoint
        checkpoint |= {name: conformed(checkpoint[name], own[name], name, counts) for name in own if name in checkpoint}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if str(self._ckpt_path) in str(error):
                raise
            raise CheckpointError(f"{self._ckpt_path}: {error}") from error
        except AlignmentError:
            raise
        except MISFITS as error:
            reason = (str(error).strip().splitlines() or [""])[-1].strip()
            raise CheckpointError(
                f"{self._ckpt_path}: cannot be restored ({type(error).__name__}: {reason}): it is damaged, or was made "
                f"by another run or version. Use an earlier one; or {FROM_WEIGHTS}."
            ) from error


def run_of(checkpoint: str | Path | None) -> Path | None:
    """The folder of the run that a checkpoint is of, seen from here; None where it is of none.

    Args:
        checkpoint: Its file or folder; None for weights that no run of ours has made.
    """
    parents = Path(checkpoint).absolute().parents if checkpoint is not None else ()
    run = next((each for each in parents if any((each / name).is_file() for name in OF_A_RUN)), None)
    return run.relative_to(Path.cwd()) if run is not None and run.is_relative_to(Path.cwd()) else run


def predictions_folder(checkpoint: str | Path | None) -> Path:
    """Where predictions go: `predictions/NAME` in the run of the checkpoint NAME, or `predictions` where there is none.

    Args:
        checkpoint: As of `run_of`.
    """
    run = run_of(checkpoint)
    return (
        Path("predictions") if run is None else run / "predictions" / Path(str(checkpoint)).name.removesuffix(".ckpt")
    )


def write_into_run_of(checkpoint: str, trainer: Trainer) -> None:
    """Have loggers without a version of their own write into the folder of the run that made a checkpoint."""
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        root = Path(str(logger.save_dir or "")) / str(logger.name)
        path = Path(os.path.abspath(checkpoint))
        if getattr(logger, "_version", "") is not None or Path(os.path.abspath(root)) not in path.parents:
            continue
        version = path.relative_to(os.path.abspath(root)).parts[0]
        if not any((root / version / name).is_file() for name in OF_A_RUN):
            continue  # a folder of checkpoints alone
        logger._version = version
        _keep_earlier(root / version)


@rank_zero_only
def _keep_earlier(folder: Path) -> None:
    """Give what a run would write anew a number, as in `metrics.1.csv`."""
    for name in KEPT:
        path = folder / name
        if path.is_file():
            number = 1
            while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
                number += 1
            shutil.copy2(path, kept)  # not moved: other ranks may still read the configuration from there
