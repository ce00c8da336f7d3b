"""The errors that users see, and the one way to ask for an optional package."""

import errno
import importlib
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

Value = TypeVar("Value")
DISK = {
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A part of the path is a file, not a folder; choose another one.",
    errno.EISDIR: "Give a file, not a folder.",
    errno.EACCES: "Choose a path that you may read and write.",
    errno.EPERM: "Choose a path that you may read and write.",
    errno.EROFS: "Choose a path that can be written.",
    errno.EEXIST: "A file is in the way; choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ENOSPC: "Make room, and run this again; what was written before is kept.",
    errno.EFBIG: "Files may not grow that large here; raise the limit, or choose another disk.",
    errno.EDQUOT: "Make room, and run this again; what was written before is kept.",
}
MAKERS = ("__init__", "__post_init__")


class AlignmentError(ValueError):
    """Base of the errors that the command line prints as one message, without a traceback."""


class ConfigError(AlignmentError):
    """A setting is missing, wrong, or does not go with another one."""


class RecordError(AlignmentError):
    """A record of a data file cannot be used.

    Args:
        where: File and line, as `path:line`.
        field: The offending field, or "" for the record as a whole.
        problem: What is wrong, with the value.
        fix: What to do about it.
    """

    def __init__(self, where: str, field: str, problem: str, fix: str) -> None:
        """Compose `where: field 'field' problem. fix`."""
        field, problem = _shortened(field, 200), _shortened(problem, 500)  # they quote the record
        self.where, self.field, self.problem, self.fix = where, field, problem, fix
        subject = f"field '{field}' " if field else ""
        super().__init__(f"{where}: {subject}{problem}. {fix}")

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str, str, str]]:
        """Make the error survive the trip out of a worker process."""
        return RecordError, (self.where, self.field, self.problem, self.fix)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


class TemplateError(AlignmentError):
    """A chat template cannot be rendered, or its rendering cannot be split into turns."""


class CheckpointError(AlignmentError):
    """A checkpoint or an export cannot be written, or does not fit the model."""


class CacheError(AlignmentError):
    """A file of the cache is damaged, or cannot be written."""


class TrainingError(AlignmentError):
    """A run cannot continue."""


class RewardError(AlignmentError):
    """A reward function has failed on a record, has taken too long, or has given something else than scores."""


class Stopped(SystemExit):
    """A run that was asked to stop by a signal; the exit code is that of a process that the signal ends.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        """Nothing is known of what was saved."""
        super().__init__(128 + number)
        self.signal, self.note = number, ""

    def __str__(self) -> str:
        """What has stopped it, and what is left."""
        what = "interrupted" if self.signal == signal.SIGINT else f"stopped by {signal.Signals(self.signal).name}"
        return f"{what}: {self.note}" if self.note else f"{what}. What was written is kept."


@contextmanager
def writing(path: Path, kind: type[AlignmentError], fix: str) -> Iterator[None]:
    """Say in one message that a file or folder cannot be written.

    Args:
        path: What is written.
        kind: The error to raise.
        fix: What to do about it.
    """
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)  # others put the path, or more, into the text
        raise kind(f"{path}: cannot be written ({why}). {fix}.") from error


@contextmanager
def constructing(what: str) -> Iterator[None]:
    """Turn what a library's constructor says about a configured value into a ConfigError; a fault of ours stays one.

    Args:
        what: What is made, for the message where no class is known.

    Raises:
        ConfigError: Naming the class that refused.
    """
    try:
        yield
    except (AlignmentError, OSError):
        raise
    except Exception as error:  # libraries refuse a value by whatever type they like
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, AlignmentError | OSError):
            root = root.__cause__  # the parser wraps what a constructor raises
        if root is not error and isinstance(root, AlignmentError | OSError):
            raise root from error
        frames = [frame for frame, _ in traceback.walk_tb(root.__traceback__)]
        if not frames or Path(__file__).parent in Path(frames[-1].f_code.co_filename).parents:
            raise
        makers = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name in MAKERS]
        names = [type(maker).__name__ for maker in makers if maker is not None]
        reason = " ".join(str(root).split()) or type(root).__name__
        raise ConfigError(f"{names[0] if names else what}: {reason}") from error


def disk_message(error: OSError) -> str | None:
    """What a user can do about an error of the file system; None where it is none of the disk's and the user's."""
    if error.errno is None:
        return str(error)  # a message of ours
    if error.errno not in DISK:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{str(error.strerror).lower()}. {DISK[error.errno]}"


def require(package: str, extra: str, instead: str = "") -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        package: The name to import.
        extra: The extra of this project that installs it.
        instead: A setting that works without the package, if there is one.

    Raises:
        ConfigError: If the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        other = f", or use {instead}" if instead else ""
        raise ConfigError(f"{package} is not installed. Run: pip install 'lit-alignment[{extra}]'{other}.") from error


def present(value: Value | None, what: str) -> Value:
    """A value whose type allows None where the order of calls does not.

    Raises:
        TypeError: If it is None: something was called too early.
    """
    if value is None:
        raise TypeError(f"{what} is not there yet.")
    return value
