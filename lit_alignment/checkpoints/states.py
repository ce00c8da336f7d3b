"""States of callbacks and optimizers from a checkpoint, taken for what they must be before anything acts on them."""

import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_alignment.errors import CheckpointError
from lit_alignment.optimizers.muon import MuonWithAdamW
from lit_alignment.optimizers.schedule_free import ScheduleFreeAdamW

PATHS = ("kth_best_model_path", "last_model_path")  # of ModelCheckpoint, which removes what they name
SCORES = ("best_model_score", "current_score")
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "z")


def folders_of(trainer: Trainer) -> list[str]:
    """Where the run's savers keep checkpoints."""
    savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.dirpath]
    return [os.path.abspath(str(saver.dirpath)) for saver in savers]


def is_inside(path: str, folders: Iterable[str]) -> bool:
    """Whether a path of this disk lies in one of some folders, by its name and behind links."""
    if "://" in path or not path:
        return False
    own, real = Path(os.path.abspath(path)), Path(path).resolve()
    wholes = map(Path, map(os.path.abspath, folders))
    return any(whole in own.parents and whole.resolve() in real.parents for whole in wholes)


def keep_own_paths(states: Any, trainer: Trainer) -> None:
    """Leave paths outside of the run's folders out of the states of callbacks, which remove or send what they name.

    Args:
        states: Of callbacks, from a checkpoint.
        trainer: The run.

    Raises:
        CheckpointError: If they have another form than callbacks write.
    """
    folders = folders_of(trainer)
    try:
        for key, state in states.items():
            if str(key).startswith("ModelCheckpoint"):
                state["dirpath"] = str(state.get("dirpath") or "")  # without one Lightning takes all paths
                best = str(state.get("best_model_path") or "")
                best = "" if "://" in best or not best else os.path.abspath(best)
                # Of an earlier run's folder it is shown; Lightning removes nothing there, if it has its full name.
                led_out = any(Path(folder) in Path(best).parents for folder in folders) and not is_inside(best, folders)
                state["best_model_path"] = "" if led_out else best
                kept = dict(state.get("best_k_models") or {})
                scores = [*kept.values(), *(state[name] for name in SCORES if state.get(name) is not None)]
                if not all(isinstance(score, Tensor) for score in scores):
                    raise TypeError(f"scores that are no tensors: {reprlib.repr(scores)}")
                state["best_k_models"] = {path: score for path, score in kept.items() if is_inside(path, folders)}
                if (worst := state.get("kth_best_model_path")) and worst not in state["best_k_models"]:
                    state["best_k_models"] = {}  # which Lightning would look for it
                for name in PATHS:
                    path = str(state.get(name) or "")
                    state[name] = path if is_inside(path, folders) else ""
            elif "exported" in state:
                state["exported"] = [path for path in state["exported"] if is_inside(path, folders)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's states of callbacks have another form ({error}). It is damaged; use an earlier one."
        ) from error


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Refuse moments that are missing, or of another shape than their parameter's: fused kernels write past their end.

    Raises:
        CheckpointError: If there is one.
    """
    hidden = {id(each) for group in optimizer.param_groups if group.get("hidden") for each in group["params"]}
    for parameter, state in optimizer.state.items():
        match optimizer:
            case MuonWithAdamW() if id(parameter) in hidden:
                needed = {"momentum_buffer"}
            case torch.optim.AdamW() | MuonWithAdamW():
                needed = {"step", "exp_avg", "exp_avg_sq"}
            case ScheduleFreeAdamW():
                needed = {"z", "exp_avg_sq"}
            case _:
                needed = set()
        if not isinstance(parameter, Tensor) or needed - state.keys():
            raise CheckpointError(
                f"the checkpoint's optimizer has {', '.join(sorted(state)) or 'nothing'} for a weight, where this "
                f"run's has {', '.join(sorted(needed))}. It is damaged; use an earlier one."
            )
        for name, value in state.items():
            shape = parameter.shape if name in MOMENTS else torch.Size()
            if name in (*MOMENTS, *needed) and (not isinstance(value, Tensor) or value.shape != shape):
                raise CheckpointError(
                    f"the checkpoint's optimizer has {name} of shape {list(getattr(value, 'shape', []))} for a weight "
                    f"of {list(parameter.shape)}. It is damaged, or of another model; use an earlier one."
                )
