"""Files: one that is written takes its name when it is whole; what others have written is taken for what it must be."""

import json
import os
import reprlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from lit_alignment.errors import AlignmentError, CheckpointError, ConfigError

Config = TypeVar("Config")
LARGEST = 2**63  # what torch and NumPy count to


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """A file to write that takes the name `path` when all is written; until then, and on an error, nothing changes."""
    fresh = path.with_name(f".{path.name}.new")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of the disk say what is written, as those of a write name no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else it is one of ours, which says what it is about
            error.filename = error.filename or str(path)
        raise


def inside(root: Path, name: str) -> Path:
    """Where a name that stands in a file lies below a folder.

    Args:
        root: The folder that the file is about.
        name: A relative path, with slashes.

    Raises:
        CheckpointError: If it is absolute, empty, or leads out of the folder, by a link too; in the hub's cache, where
            `snapshots/COMMIT` holds links into `blobs` beside it, out of that too.
    """
    path, own = root / relative(name, root), root.resolve()
    hub = next((each.parent / "blobs" for each in own.parents if each.name == "snapshots"), own)
    if not any(path.resolve().is_relative_to(each) for each in (own, hub)):
        raise CheckpointError(f"{root}: {name!r} is a link that leads out of it. Use another one.")
    return path


def relative(name: Any, where: object) -> PurePosixPath:
    """The same of a name alone, for folders that are not on this disk.

    Raises:
        CheckpointError: If it is no name, absolute, empty, or leads out of the folder.
    """
    given = PurePosixPath(name if isinstance(name, str) else "")
    outside = given.is_absolute() or PureWindowsPath(given).anchor or ".." in given.parts
    if outside or not given.parts or not given.as_posix().isprintable():
        raise CheckpointError(f"{where}: names the file {name!r}, which is not inside it. Use another one.")
    return given


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: The file.
        what: What it should be, for the message.

    Raises:
        ConfigError: If it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers too long, too deep
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not {what} ({reason}). Restore the file, or make it again.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not {what} (it holds a {type(found).__name__}). Restore it, or make it again.")
    return found


def config_in(path: Path, kind: type[Config], what: str) -> Config:
    """A settings dataclass from a file of JSON; fields that it does not know are of another version, and left out.

    Args:
        path: The file.
        kind: The dataclass.
        what: What it should be, for the message.

    Raises:
        ConfigError: If it is no JSON object.
        CheckpointError: If a field is missing, or of the wrong type.
    """
    known = get_type_hints(kind)
    return config_from(kind, {name: each for name, each in read_json(path, what).items() if name in known}, path)


def config_from(kind: type[Config], values: Any, where: object) -> Config:
    """A settings dataclass from plain values of a file.

    Args:
        kind: The dataclass.
        values: A dict of its fields.
        where: The file, for the message.

    Raises:
        CheckpointError: If a field is unknown, missing, or of the wrong type.
    """
    try:
        hints = get_type_hints(kind)
        for name, value in dict(values).items():
            if not _fits(value, hints[name]):
                raise TypeError(f"{name} is {reprlib.repr(value)}")
        return kind(**values)
    except AlignmentError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{where}: not the values of a {kind.__name__} ({error}). It is damaged, or of another version of "
            "lit_alignment."
        ) from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be a field's."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(each, inner[0]) for each in value)
    if is_dataclass(hint) or hint is None:
        return isinstance(value, type(None) if hint is None else hint)  # type: ignore[arg-type]
    if hint in (int, float):
        return isinstance(value, int | float if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def check_folder(folder: Path) -> None:
    """Refuse a model's folder whose list of weights names files elsewhere.

    Raises:
        CheckpointError: If it does.
    """
    for index in folder.glob("*.index.json"):
        names = read_json(index, "a list of weights").get("weight_map")
        for name in set(names.values()) if isinstance(names, dict) else ():
            relative(name, index)


@dataclass(frozen=True)
class ModelDescription:
    """Fields of `config.json` that transformers takes for what they should be."""

    model_type: str = ""
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | dict[str, Any] | None = None
    id2label: dict[str, str] | None = None
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class GenerationDescription:
    """The same of `generation_config.json`."""

    eos_token_id: int | list[int] | None = None
    stop_strings: str | list[str] | None = None
    compile_config: dict[str, Any] | None = None
    watermarking_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class TokenizerDescription:
    """The same of `tokenizer_config.json`."""

    tokenizer_class: str | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    auto_map: dict[str, Any] | list[Any] | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    extra_special_tokens: list[Any] | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None


DESCRIPTIONS = {
    "config.json": ModelDescription,
    "generation_config.json": GenerationDescription,
    "tokenizer_config.json": TokenizerDescription,
}


def check_descriptions(folder: Path) -> None:
    """Name the file beside a model's weights, and its field, that has the wrong form, if one has.

    Raises:
        ConfigError: If it is no JSON object.
        CheckpointError: If a field has the wrong type.
    """
    for name, kind in DESCRIPTIONS.items():
        if (folder / name).is_file():
            config_in(folder / name, kind, "a description of a model, its tokenizer or its decoding")
    for name in ("tokenizer.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            read_json(folder / name, "a part of a tokenizer or processor")


def conformed(stored: Any, own: Any, key: str, counts: bool = False) -> Any:
    """A part of a checkpoint in the form of this run's own part; names that this run does not have are left out.

    Flags say how something is computed, and stay this run's own, but for those beside counters.

    Args:
        stored: The part.
        own: This run's; None stands for anything, and an empty container for any of its kind.
        key: Where it stands, for the message.
        counts: Whether all numbers are counters.

    Raises:
        CheckpointError: If a name is missing, but for flags, or a value is of another type, non-finite or too large.
    """
    if own is None:
        return stored
    if not _has_form(stored, own, counts):
        raise CheckpointError(
            f"the checkpoint has {key}: {reprlib.repr(stored)}, where this run has {reprlib.repr(own)}. It is damaged, "
            "or of another version; use an earlier one."
        )
    if isinstance(own, dict) and own:
        missing = [name for name, value in own.items() if name not in stored and not isinstance(value, bool | None)]
        if missing:
            raise CheckpointError(f"the checkpoint has no {key}.{missing[0]}. It is damaged; use an earlier one.")
        return {name: conformed(stored.get(name, form), form, f"{key}.{name}", counts) for name, form in own.items()}
    if isinstance(own, list | tuple) and own:
        last = len(own) - 1
        return type(own)(conformed(each, own[min(n, last)], f"{key}.{n}", counts) for n, each in enumerate(stored))
    return own if isinstance(own, bool) and not counts else stored


def _has_form(stored: Any, own: Any, counts: bool) -> bool:
    if isinstance(own, bool):
        return isinstance(stored, bool | None)
    if isinstance(own, int | float):
        least = min(own, 0) if isinstance(own, int) else -LARGEST
        is_number = isinstance(stored, int if counts else int | float) and not isinstance(stored, bool)
        return is_number and (least <= stored < LARGEST or not abs(own) < LARGEST)
    if isinstance(own, Tensor):
        return isinstance(stored, Tensor) and stored.shape == own.shape
    if isinstance(own, list | tuple):  # strategies that shard make one of the other
        return isinstance(stored, list | tuple) and (isinstance(own, list) or len(stored) == len(own))
    return isinstance(stored, type(own))
