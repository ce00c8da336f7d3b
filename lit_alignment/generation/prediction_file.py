"""A file of predictions that grows line by line, survives a kill, and ends in the order of the prompts."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_alignment.data.encoding.messages import Record, read_record
from lit_alignment.data.sources.records import READERS
from lit_alignment.errors import ConfigError, RecordError

Key = tuple[str, str]  # (dataset, id)


class PredictionFile:
    """Appends lines to `<path>.partial` as they come, and writes `<path>` in order when all are there.

    Args:
        path: The final file.
        rank: This process; each has its own partial file.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        """Make the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial{rank}")

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Write down how the answers are made, in `<path stem>.settings.json`, or compare with what stands there.

        Raises:
            ConfigError: If answers that are already there were made in another way.
        """
        manifest = self.path.with_suffix(".settings.json")
        current = json.loads(json.dumps(settings, default=str))
        if manifest.exists() and (self.path.exists() or self._partials()):
            earlier = json.loads(manifest.read_text())
            changed = sorted(key for key in earlier.keys() | current.keys() if earlier.get(key) != current.get(key))
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"{self.path} was made with other settings ({key}: {earlier.get(key)} there, {current.get(key)} "
                    "now). Set the PredictionWriter's output_dir to a new folder, or overwrite: true."
                )
        manifest.write_text(json.dumps(current, indent=2) + "\n")

    def remove(self) -> None:
        """Delete the final file and this rank's partial file."""
        self.path.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)

    def answered(self) -> set[Key]:
        """What an earlier, unfinished or finished, run has answered, on any rank."""
        files = [*self._partials(), *([self.path] if self.path.exists() else [])]
        return {(line["dataset"], line["id"]) for file in files for line in _complete_lines(file)}

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write lines so that a kill after this call loses none of them."""
        with self.partial.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def repair(self) -> None:
        """Cut a half-written last line off this rank's partial file."""
        if self.partial.exists():
            data = self.partial.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with self.partial.open("r+b") as file:
                    file.truncate(len(whole))

    def finish(self, order: dict[Key, int]) -> None:
        """Write the final file in the given order from all partial files, and remove them."""
        lines = {}
        for file in [*([self.path] if self.path.exists() else []), *self._partials()]:
            for line in _complete_lines(file):
                lines[line["dataset"], line["id"]] = line
        # Answers to prompts of an earlier run with other sources stay, at the end.
        ordered = sorted(lines, key=lambda key: order.get(key, len(order)))
        fresh = self.path.with_name(f".{self.path.name}.new")
        with fresh.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(lines[key], ensure_ascii=False) + "\n" for key in ordered)
            out.flush()
            os.fsync(out.fileno())
        os.replace(fresh, self.path)
        for file in self._partials():
            file.unlink()

    def _partials(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.partial*"))


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Parsed lines; a last line without its line end is what a kill left, and is skipped."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(
                    f"{path}:{number}", "", f"not valid JSON ({error.msg})", "Remove the line; it is answered again."
                ) from error


def read_predictions(paths: Sequence[Path]) -> Iterator[tuple[dict[str, Any], Record]]:
    """The lines of files that predict has written, each with its conversation; `dataset` is the file's name if missing.

    Raises:
        FileNotFoundError: If a file is not there.
        RecordError: If a line is none of predict's, or answers what another line has answered.
    """
    seen: dict[Key, str] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()}).")
        for where, raw in READERS[".jsonl"](path):
            record = read_record(raw, where, 0)
            line = {"dataset": path.stem, **raw, "id": record.id}
            for name, value, kind in (
                ("id", raw.get("id"), str | int),
                ("answers", raw.get("answers"), list),
                ("dataset", line["dataset"], str),
            ):
                if not isinstance(value, kind):
                    fix = "Give a file that predict has written."
                    if name == "answers" and "prediction" in raw:
                        fix = "These are a classifier's predictions, which `lit-alignment test` measures."
                    raise RecordError(where, name, "is missing or wrong", fix)
            key = line["dataset"], line["id"]
            if key in seen:
                problem = f"'{record.id}' of '{key[0]}' was answered at {seen[key]} already"
                fix = "Take files with answers to the same prompts one by one."
                raise RecordError(where, "id", problem, fix)
            if not line["answers"]:
                raise RecordError(where, "answers", "is empty", "Remove the line, or answer it again.")
            seen[key] = where
            yield line, record
