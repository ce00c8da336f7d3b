"""Files: one that is written takes its name when it is whole; what others have written is taken for what it must be."""

import json
import os
import reprlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_alignment.errors import AlignmentError, CheckpointError, ConfigError

Config = TypeVar("Config")


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
        error.filename = error.filename or str(path)
        raise


def inside(root: Path, name: str) -> Path:
    """Where a name that stands in a file lies below a folder.

    Args:
        root: The folder that the file is about.
        name: A relative path, with slashes.

    Raises:
        CheckpointError: If it is absolute, empty, or leads out of the folder, by a link too.
    """
    path = root / relative(name, root)
    if not path.resolve().is_relative_to(root.resolve()):
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
