"""Checkpoints in shards: whole or not at all, and readable by any number of processes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load
from torch.distributed.distributed_c10d import ProcessGroup, broadcast_object_list, get_rank

from lit_alignment.checkpoints.hf_folder import PARTIAL, flush_folder
from lit_alignment.checkpoints.reading import ShardPlanner, ShardReader, WholePlanner, read_plain, unreadable
from lit_alignment.errors import CheckpointError

REST = "meta.pt"  # what is no tensor, as Lightning names it
OPTIMIZER = "optimizer_"
OLD = ".old"


def is_sharded(path: Path) -> bool:
    """Whether a path is the folder of a checkpoint in shards."""
    return (path / REST).is_file() and (path / ".metadata").is_file()


def split_checkpoint(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is sharded of one of Lightning's checkpoints, and the rest."""
    rest = dict(checkpoint)
    shards = {"state_dict": rest.pop("state_dict")}
    shards |= {f"{OPTIMIZER}{number}": state for number, state in enumerate(rest.pop("optimizer_states", []))}
    return shards, rest


def partial_path(path: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return path.with_name(f".{path.name}{PARTIAL}")


def put_in_place(partial: Path, path: Path, rest: dict[str, Any]) -> None:
    """Complete a folder whose shards are written, and give it its name; called on one process.

    Args:
        partial: The folder.
        path: Its name; a checkpoint that has it stays until the new one is there.
        rest: What is no shard.
    """
    torch.save(rest, partial / REST)
    for written in (partial / REST, *partial.glob("*.distcp")):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    swap(partial, path)


def swap(partial: Path, path: Path) -> None:
    """Give a whole file or folder its name; a checkpoint that has it stays until then."""
    old = path.with_name(f".{path.name}{OLD}")
    if path.is_dir() or (path.exists() and partial.is_dir()):  # a file alone is replaced in one step, by a file
        _remove(old)
        os.replace(path, old)
    os.replace(partial, path)
    flush_folder(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cannot_save(path: Path, error: BaseException) -> str:
    """What to say when a checkpoint cannot be written."""
    if isinstance(error, CheckpointException):  # holds an error of each process that has one
        error = next((error for error, _ in error.failures.values()), error)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "enforce fail" in reason:  # a short write, as torch has it
        reason = "its disk is full, or files may not grow that large there"
    return (
        f"{path}: cannot save the checkpoint ({reason}). Earlier checkpoints are untouched; free "
        "some space or set another folder, then resume with --ckpt_path."
    )


def on_first(path: Path, work: Callable[[], None], group: ProcessGroup | None = None) -> None:
    """Do something for a checkpoint on the first process while the others wait.

    Args:
        path: The checkpoint.
        work: What to do.
        group: The processes; all by default.

    Raises:
        CheckpointError: On all processes, if it fails.
    """
    problem: list[str | None] = [None]
    cause: Exception | None = None
    if get_rank() == 0:
        try:
            work()
        except CheckpointError as error:
            problem, cause = [str(error)], error
        except (OSError, RuntimeError) as error:
            problem, cause = [cannot_save(path, error)], error
    broadcast_object_list(problem, 0, group)
    if problem[0] is not None:
        raise CheckpointError(problem[0]) from cause


def new_partial(path: Path, group: ProcessGroup | None = None) -> Path:
    """An empty folder in which all processes write a checkpoint."""
    folder = partial_path(path)

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    on_first(path, make, group)
    return folder


def found_path(path: Path) -> Path:
    """The checkpoint, or the earlier one of its name if the process was killed between two renames."""
    old = path.with_name(f".{path.name}{OLD}")
    return old if not path.exists() and old.exists() else path


def read_rest(path: Path) -> dict[str, Any]:
    """What is no shard.

    Raises:
        CheckpointError: If it is damaged.
    """
    return read_plain(path / REST)


def read_into(path: Path, state: dict[str, Any]) -> None:
    """Fill tensors, sharded over any number of processes, from a checkpoint that any number has written.

    Raises:
        CheckpointError: If it is damaged or lacks one.
    """
    reader = ShardReader(path)
    reader.read_metadata()  # else torch logs what is wrong as a fault of its own
    _guarded(path, lambda: load(state, storage_reader=reader, planner=ShardPlanner()))


def read_whole(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint in shards as one process would have written it, in the form that its optimizers load.

    Args:
        path: Its folder.
        optimizers: Whether to read their states.

    Raises:
        CheckpointError: If it is damaged.
    """
    shards: dict[str, Any] = {}
    reader = ShardReader(path)
    reader.read_metadata()  # as above
    planner = WholePlanner(None if optimizers else {"state_dict"})
    _guarded(path, lambda: _load_state_dict(shards, reader, planner=planner, no_dist=True))
    states = [by_number(shards[name]) for name in sorted(shards) if name.startswith(OPTIMIZER)]
    return read_rest(path) | {"state_dict": shards.get("state_dict"), "optimizer_states": states}


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the positions of its parameters, as torch has it, from one by their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: own for name, own in state["state"].items()}, "param_groups": groups}


def by_name(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The other way round.

    Args:
        state: As torch has it.
        groups: The names of the same parameters, in groups and in order.
    """
    names = [name for group in groups for name in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(names) != len(numbers):
        raise CheckpointError(f"the checkpoint's optimizer has {len(numbers)} parameters, this one {len(names)}.")
    stored = [name for group in state["param_groups"] for name in group.get("param_names") or ()]
    found = dict(zip(numbers, stored or names, strict=True))  # groups may be others since then
    own = [{**group, "params": [found[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {found[number]: value for number, value in state["state"].items()}, "param_groups": own}


def stored_names(path: Path) -> set[str]:
    """Names of the weights in a checkpoint.

    Raises:
        CheckpointError: If it is damaged.
    """
    metadata = _guarded(path, lambda: ShardReader(path).read_metadata())
    return {name.removeprefix("state_dict.") for name in metadata.state_dict_metadata if name.startswith("state_dict.")}


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (FileNotFoundError, CheckpointError):
        raise
    except CheckpointException as error:  # of whichever rank has one
        first = next((each for each, _ in error.failures.values()), error)
        raise first if isinstance(first, CheckpointError) else unreadable(path, first) from error
    except Exception as error:  # a damaged shard raises whatever its reader happens to
        raise unreadable(path, error) from error


def full(tensor: Any) -> Tensor:
    """The whole of a sharded tensor; all processes have to ask for it."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered
