"""A folder behind an fsspec URL, with a manifest of what it holds whole."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.files import config_from, relative
from lit_alignment.secrets import mask_text

MANIFEST = "manifest.json"
FIRST_WAIT = 1.0  # seconds before the second attempt; each further one waits twice as long
REMOVING = "being removed"

RemoteKind = Literal["checkpoint", "export", "report"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """One file of an item.

    Args:
        name: Path below the URL.
        size: In bytes.
        sha256: Of the content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class RemoteItem:
    """One checkpoint, export or report, as the manifest lists it.

    Args:
        name: Name of the file or folder below the URL.
        kind: What it is.
        files: The files that it consists of.
        time: When it was saved, in UTC, as ISO 8601.
        step: Optimizer step.
        monitor: Name of the metric that `score` is.
        score: The metric of this checkpoint.
        best: Whether no other item of its kind has a better score.
        uploaded: Whether all files are there, whole.
        problem: Why not.
    """

    name: str
    kind: RemoteKind
    files: tuple[RemoteFile, ...]
    time: str
    step: int | None = None
    monitor: str | None = None
    score: float | None = None
    best: bool = False
    uploaded: bool = False
    problem: str = ""


def _item(entry: dict[str, Any], where: str) -> RemoteItem:
    """An item of a manifest, whose files all belong to it.

    Raises:
        CheckpointError: If it is none, or names files that a download would write, or retention remove, elsewhere.
    """
    files = tuple(config_from(RemoteFile, file, where) for file in entry["files"])
    item = config_from(RemoteItem, {**entry, "files": files}, where)
    for name in (item.name, *(file.name for file in files)):
        if len(relative(item.name, where).parts) > 1 or relative(name, where).parts[0] != item.name:
            raise CheckpointError(f"{where}: names the file {name!r}, which is no part of {item.name!r}.")
    return item


def describe(folder: Path, name: str) -> tuple[RemoteFile, ...]:
    """The file `name` in a folder, or the files below it, with sizes and hashes."""
    path = folder / name
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return tuple(RemoteFile(p.relative_to(folder).as_posix(), p.stat().st_size, sha256(p)) for p in paths)


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """Class and first line of an error: many of the storage libraries' messages are empty or long."""
    return mask_text(": ".join([type(error).__name__, *str(error).splitlines()[:1]]))


class RemoteFolder:
    """Files below a URL. Not for use by several threads at once.

    Args:
        url: `s3://bucket/folder`, `gs://...`, `file:///...` or another address that fsspec knows.
        storage_options: What the file system's class takes, such as `endpoint_url`.
        attempts: How often to try each operation.

    Raises:
        ConfigError: If the URL is malformed, or its protocol needs a package that is not installed.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None, attempts: int = 4) -> None:
        """Nothing is read or written yet."""
        self.url, self.attempts = mask_text(url.rstrip("/")), attempts
        self.fs, self.path = _open(url.rstrip("/"), dict(storage_options or {}))
        self.items: dict[str, RemoteItem] = {}

    def check_writable(self) -> None:
        """Write, read and delete a small file.

        Raises:
            ConfigError: If that fails.
        """
        name = ".write-test"
        try:
            self._put_text("works", name)
            found = self._retried(lambda: self.fs.cat_file(f"{self.path}/{name}"))
            self.remove(name)
        except Exception as error:  # every storage library has errors of its own
            raise ConfigError(
                f"cannot write to {self.url} ({reason(error)}). Check the address, the credentials and the rights."
            ) from error
        if found != b"works":
            raise ConfigError(f"{self.url} gives back other bytes than were written there. Choose another address.")

    def read_manifest(self) -> None:
        """Fill `items` from the manifest, if there is one.

        Raises:
            ConfigError: If it cannot be read, or is not one of ours.
            CheckpointError: If it names files outside of its items.
        """
        where = f"{self.url}/{MANIFEST}"
        try:
            self.fs.invalidate_cache()
            found = json.loads(self._retried(lambda: self.fs.cat_file(f"{self.path}/{MANIFEST}"), FileNotFoundError))
            items = [_item(entry, where) for entry in found["items"]]
        except FileNotFoundError:
            items = []
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"{where} is not a manifest of lit-alignment ({reason(error)}). Choose another address."
            ) from error
        except Exception as error:  # every storage library has errors of its own
            raise ConfigError(
                f"cannot read {where} ({reason(error)}). Check the address and the credentials."
            ) from error
        self.items = {item.name: item for item in items}

    def store(self, item: RemoteItem, folder: Path) -> bool:
        """Send an item, and enter it into the manifest when it is there whole.

        Args:
            item: What to send; its files lie under the same names in `folder`.
            folder: Where the files are.

        Returns:
            False if the manifest says that the same bytes are there already.
        """
        old = self.items.get(item.name)
        if old is not None and old.uploaded:
            if old.files == item.files:
                return False
            self.enter(replace(old, uploaded=False, problem="being replaced"))
        for file in item.files:
            self._retried(lambda file=file: self._put(folder / file.name, file))  # type: ignore[misc]
        self.enter(replace(item, uploaded=True, problem=""))
        for name in {file.name for file in (old.files if old else ())} - {file.name for file in item.files}:
            self.remove(name)
        return True

    def enter(self, item: RemoteItem, attempts: int | None = None) -> None:
        """Put an item into the manifest, in the place of one with its name, and write the manifest."""
        self.items[item.name] = item
        self._write_manifest(attempts)

    def mark_best(self, modes: Mapping[str, str]) -> None:
        """Set `best` of each item.

        Args:
            modes: For each metric, whether `min` or `max` is good.
        """
        best = set()
        for kind in ("checkpoint", "export"):
            for monitor, mode in modes.items():
                scored = [i for i in self.items.values() if (i.kind, i.monitor, i.uploaded) == (kind, monitor, True)]
                scores = {i.name: i.score for i in scored if i.score is not None}
                if scores:
                    best.add((min if mode == "min" else max)(scores, key=scores.__getitem__))
        if best != {item.name for item in self.items.values() if item.best}:
            self.items = {name: replace(item, best=name in best) for name, item in self.items.items()}
            self._write_manifest()

    def keep_newest(self, keep: int) -> None:
        """Remove all but the newest checkpoints and exports, and the best.

        Only files that the manifest lists are removed, one by one: to delete by prefix would take `step=10` away
        with `step=1`.

        Args:
            keep: How many of each kind to keep.
        """
        for kind in ("checkpoint", "export"):
            whole = [item for item in self.items.values() if item.kind == kind and item.uploaded]
            newest = sorted(whole, key=lambda item: (item.time, item.step or 0), reverse=True)
            for item in newest[keep:]:
                if not item.best:
                    self.items[item.name] = replace(item, uploaded=False, problem=REMOVING)
        removing = [item for item in self.items.values() if item.problem == REMOVING]
        if not removing:
            return
        self._write_manifest()  # first, so that a kill here leaves nothing listed as whole that is not
        for item in removing:
            for file in item.files:
                self.remove(file.name)
            self._remove_empty(item.name)
            del self.items[item.name]
        self._write_manifest()

    def remove(self, name: str) -> None:
        """Delete one file; one that is not there is fine."""
        try:
            self._retried(lambda: self.fs.rm_file(f"{self.path}/{name}"), FileNotFoundError)
        except FileNotFoundError:
            return

    def _remove_empty(self, name: str) -> None:
        """Delete the folder that a removed export leaves on a disk; object stores have no folders."""
        path = f"{self.path}/{name}"
        if isinstance(self.fs, LocalFileSystem) and self.fs.isdir(path) and not self.fs.ls(path):
            self.fs.rmdir(path)

    def _put(self, local: Path, file: RemoteFile) -> None:
        self.fs.put_file(str(local), f"{self.path}/{file.name}")
        size = self.fs.info(f"{self.path}/{file.name}")["size"]
        if size != file.size:
            raise OSError(f"{file.name} has {size} bytes there and {file.size} here")

    def _put_text(self, text: str, name: str, attempts: int | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "text"
            local.write_text(text, encoding="utf-8")
            # put_file makes the folders that a file system needs; object stores show a file when it is whole.
            if isinstance(self.fs, LocalFileSystem):
                self._retried(lambda: self.fs.put_file(str(local), f"{self.path}/.{name}.partial"), attempts=attempts)
                self._retried(lambda: self.fs.mv(f"{self.path}/.{name}.partial", f"{self.path}/{name}"))
            else:
                self._retried(lambda: self.fs.put_file(str(local), f"{self.path}/{name}"), attempts=attempts)

    def _write_manifest(self, attempts: int | None = None) -> None:
        text = json.dumps({"items": [asdict(item) for item in self.items.values()]}, indent=2, ensure_ascii=False)
        self._put_text(text + "\n", MANIFEST, attempts)

    def _retried(
        self, action: Callable[[], Result], final: type[Exception] | tuple[()] = (), attempts: int | None = None
    ) -> Result:
        """The action's result; errors are tried again with growing waits, except those of the class `final`."""
        attempts = attempts or self.attempts
        for attempt in range(attempts - 1):
            try:
                return action()
            except final:
                raise
            except Exception:  # every storage library has errors of its own; the last attempt's is raised
                time.sleep(FIRST_WAIT * 2**attempt)
        return action()


def _open(url: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    scheme, separator, rest = url.partition("://")
    if not scheme or not separator or not rest:
        raise ConfigError(
            f"'{mask_text(url)}' is not a URL of a folder. Write s3://bucket/folder, gs://..., or file:///folder."
        )
    if scheme in ("file", "local"):
        options = {"auto_mkdir": True} | options
    try:
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(f"{mask_text(url)}: {error} (with pip, beside lit-alignment).") from error
    except Exception as error:  # an unknown protocol, or what the file system's class makes of its options
        raise ConfigError(
            f"{mask_text(url)}: cannot open ({reason(error)}). Check the address and storage_options."
        ) from error
    return fs, path.rstrip("/")
