"""A file of predictions that grows line by line, survives a kill, and ends in the order of the prompts."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lit_alignment.data.encoding.messages import Record, read_record
from lit_alignment.data.sources.readers import read_file
from lit_alignment.errors import ConfigError, RecordError, writing
from lit_alignment.secrets import masked

Key = tuple[str, str]  # (dataset, id)
Kind = Literal["answers", "classes", "rewards"]  # of a generator, a classifier, a reward model
ANOTHER = "Set the PredictionWriter's output_dir to a new folder, or overwrite: true."
FULL = (
    "Free its disk, or set the PredictionWriter's output_dir to a folder that can be written; what is answered is kept"
)
LOCK = ".lock"
FORMAT = 1  # of the settings' file

on_disk = partial(writing, kind=ConfigError, fix=FULL)


class PredictionFile:
    """Appends lines to `<path>.partial` as they come, and writes `<path>` in order when all are there.

    A line carries the `fingerprint` of its prompt, and counts as an answer to a prompt of the same fingerprint only.

    Args:
        path: The final file.
        rank: This process; each has its own partial file.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        """Make the folder."""
        with on_disk(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial{rank}")
        self.manifest = path.with_suffix(".settings.json")

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Compare how the answers are made with how those that are there were.

        Raises:
            ConfigError: If they were made in another way, or it is not known in which.
        """
        if not any(file.exists() for file in self._files()):
            return
        try:
            earlier = json.loads(self.manifest.read_bytes()) if self.manifest.exists() else None
        except (ValueError, RecursionError):
            earlier = None
        if not isinstance(earlier, dict) or not earlier.keys() & {"format", "model"}:  # which no version left out
            raise ConfigError(
                f"{self.manifest}: missing or damaged, and it says how the answers of {self.path} were made. {ANOTHER}"
            )
        current = _as_written(settings)
        if "format" not in earlier:  # an earlier version, which noted less; its answers are given again
            earlier = current | earlier
        for key in sorted(earlier.keys() | current.keys()):
            if earlier.get(key) != current.get(key):
                raise ConfigError(
                    f"{self.path} was made with other settings ({key}: {earlier.get(key)} there, {current.get(key)} "
                    f"now). {ANOTHER}"
                )

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write down how the answers are made, in `<path stem>.settings.json`."""
        self._replace(self.manifest, [json.dumps(_as_written(settings), indent=2) + "\n"])

    def remove(self) -> None:
        """Delete the final file and the partial files of all ranks."""
        with on_disk(self.path):
            for file in self._files():
                file.unlink(missing_ok=True)

    def answered(self, asked: dict[Key, str]) -> tuple[set[Key], set[Key]]:
        """What an earlier, unfinished or finished, run has answered, on any rank.

        Args:
            asked: The fingerprint of each prompt.

        Returns:
            Prompts that are answered, and prompts of other fingerprints then, or unknown ones, that are not.
        """
        found: tuple[set[Key], set[Key]] = set(), set()
        for key, line in self._lines():
            if key in asked:
                found[line.get("fingerprint") != asked[key]].add(key)
        return found[0], found[1] - found[0]

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write lines so that a kill after this call loses none of them.

        Raises:
            ConfigError: If the disk is full; the file stays as it was.
        """
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        with on_disk(self.partial), self.partial.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def repair(self) -> None:
        """Cut a half-written last line off this rank's partial file."""
        if self.partial.exists():
            data = self.partial.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with on_disk(self.partial), self.partial.open("r+b") as file:
                    file.truncate(len(whole))

    def finish(self, asked: dict[Key, str]) -> None:
        """Write the final file in the order of the prompts from all partial files, and remove them.

        Answers to prompts of an earlier run with other sources stay, at the end.

        Args:
            asked: The fingerprint of each prompt.
        """
        order = {key: index for index, key in enumerate(asked)}
        lines = {
            key: line
            for key, line in self._lines()
            if line.get("fingerprint") == asked.get(key, line.get("fingerprint"))
        }
        ordered = sorted(lines, key=lambda key: order.get(key, len(order)))
        self._replace(self.path, (json.dumps(lines[key], ensure_ascii=False) + "\n" for key in ordered))
        for file in self._files()[1:]:
            file.unlink()

    def _files(self) -> list[Path]:
        return [self.path, *sorted(self.path.parent.glob(f"{self.path.name}.partial*"))]

    def _lines(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        return (line for file in self._files() if file.exists() for line in _complete_lines(file))

    @staticmethod
    def _replace(path: Path, lines: Iterable[str]) -> None:
        """Write a file whole or not at all."""
        fresh = path.with_name(f".{path.name}.new")
        try:
            with on_disk(path):
                with fresh.open("w", encoding="utf-8") as out:
                    out.writelines(lines)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


def _as_written(settings: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps({"format": FORMAT, **masked(settings)}, default=str)))


def _complete_lines(path: Path) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Parsed lines by dataset and id; a last line that a kill has cut off is skipped."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = json.loads(raw)
                json.dumps(line, ensure_ascii=False).encode()  # it is written again, which a lone surrogate cannot be
                problem = "no prediction (an object with 'dataset' and 'id')"
            except (ValueError, RecursionError) as error:
                if not raw.endswith(b"\n"):
                    return
                line, problem = None, f"not valid JSON ({error})"
            dataset, id = (line.get("dataset"), line.get("id")) if isinstance(line, dict) else (None, None)
            if not isinstance(dataset, str) or not isinstance(id, str):
                raise RecordError(f"{path}:{number}", "", problem, "Remove the line; it is answered again.")
            yield (dataset, id), line


def lock_folder(folder: Path) -> IO[bytes] | None:
    """Take a folder for this process, until the file that comes back is given to `unlock_folder`, or the process ends.

    Raises:
        ConfigError: If another process has it.
    """
    if os.name == "nt":  # it has no such locks
        return None
    import fcntl

    path = folder / LOCK
    while True:
        with on_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ConfigError(
                f"{folder}: another predict is writing here. Wait for it, or set the PredictionWriter's output_dir to "
                "another folder."
            ) from error
        except OSError as error:
            rank_zero_warn(f"{folder}: cannot be locked ({error.strerror}). Start no other predict that writes there.")
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # who had it has just removed the file


def unlock_folder(file: IO[bytes]) -> None:
    """Give a folder back."""
    Path(file.name).unlink(missing_ok=True)
    file.close()


def kind_of_predictions(path: Path) -> Kind:
    """Whose predictions a file holds, by its first line.

    Raises:
        FileNotFoundError: If it is not there.
    """
    _, first = next(_records(path), ("", None))
    if not isinstance(first, dict):
        return "answers"
    return "classes" if "prediction" in first else "rewards" if "rewards" in first else "answers"


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()}).")
    return read_file(path, suffix=".jsonl")


def read_predictions(paths: Sequence[Path], kind: Kind = "answers") -> Iterator[tuple[dict[str, Any], Record]]:
    """The lines of files that predict has written, each with its conversation; `dataset` is the file's name if missing.

    Args:
        paths: The files.
        kind: Whose predictions they hold.

    Raises:
        FileNotFoundError: If a file is not there.
        RecordError: If a line is none of predict's, or answers what another line has answered.
    """
    seen: dict[Key, str] = {}
    needed = "prediction" if kind == "classes" else "answers"
    for path in paths:
        for where, raw in _records(path):
            record = read_record(raw, where, 0)
            line = {"dataset": path.stem, **raw, "id": record.id}
            line.pop("fingerprint", None)  # of use to predict alone
            for name, value, wanted in (
                ("id", raw.get("id"), str | int),
                (needed, raw.get(needed), object if kind == "classes" else list),
                ("messages", raw.get("messages"), list),
                ("dataset", line["dataset"], str),
            ):
                if not isinstance(value, wanted) or value is None:
                    fix = "Give a file that predict has written."
                    if name == "answers" and "prediction" in raw:
                        fix = "These are a classifier's predictions, which have no answers."
                    raise RecordError(where, name, "is missing or wrong", fix)
            key = line["dataset"], line["id"]
            if key in seen:
                problem = f"'{record.id}' of '{key[0]}' was answered at {seen[key]} already"
                fix = "Take files with answers to the same prompts one by one."
                raise RecordError(where, "id", problem, fix)
            if kind == "answers" and not line["answers"]:
                raise RecordError(where, "answers", "is empty", "Remove the line, or answer it again.")
            seen[key] = where
            yield line, record
