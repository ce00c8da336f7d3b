"""Files of text in a folder and those below it, and what is there besides and is not read."""

import codecs
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from lit_alignment.data.sources.readers import readable

TEXT_SUFFIXES = (".md", ".markdown", ".rst", ".text", ".txt")
MARKDOWN_SUFFIXES = (".md", ".markdown", ".qmd", ".rmd")
BEGINNING = 8192  # bytes in which a binary file has a zero, as git looks for one
MOST_SUFFIXES = 4  # that a message lists


@dataclass(frozen=True)
class TextFiles:
    """What was found under a path.

    Args:
        root: The folder; of a single file the one it is in.
        files: Files of text, sorted by their paths below the root.
        skipped: How many others there are, by what they are.
    """

    root: Path
    files: list[Path]
    skipped: Counter[str] = field(default_factory=Counter)

    def name_of(self, file: Path) -> str:
        """The path of a file below the root, with slashes on every system."""
        return file.relative_to(self.root).as_posix()

    def line(self) -> str:
        """How many files of text there are, and what else."""
        number = len(self.files)
        listed = ", ".join(f"{count} {what}" for what, count in _most(self.skipped))
        return f"{number} {'file' if number == 1 else 'files'} of text" + (f"; skipped: {listed}" if listed else "")


def text_files(path: Path, suffixes: Collection[str]) -> TextFiles:
    """The files of text under a folder, at any depth, or a single file.

    Not read, but counted: what is hidden (its name begins with a dot; a folder counts once), links (the file that one
    stands for is read where it is, and nothing outside the folder is), files with a zero byte at their beginning, and
    files with other ends. Nothing is executed or followed.

    Args:
        path: The folder, which may itself be a link; or a file.
        suffixes: Ends of names that say that a file is text, in small letters.

    Raises:
        RecordError: If a file cannot be read.
    """
    if path.is_file():
        return TextFiles(path.parent, [path])
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for place, folders, names in os.walk(path):
        skipped["hidden"] += sum(name.startswith(".") for name in [*folders, *names])
        skipped["links"] += sum(os.path.islink(os.path.join(place, name)) for name in folders if name[0] != ".")
        folders[:] = [name for name in folders if name[0] != "."]  # os.walk itself follows no link
        for name in names:
            file = Path(place, name)
            if name.startswith("."):
                continue
            if file.is_symlink():
                skipped["links"] += 1
            elif file.suffix.lower() not in suffixes or not file.is_file():
                others[file.suffix.lower() or "no suffix"] += 1
            elif _is_binary(file):
                skipped["binary"] += 1
            else:
                files.append(file)
    if others:
        kinds = [f"{kind} {count}" for kind, count in _most(others)[:MOST_SUFFIXES]]
        more = ", ..." if len(others) > MOST_SUFFIXES else ""
        skipped[f"of other kinds ({', '.join(kinds)}{more})"] = others.total()
    files.sort(key=lambda file: file.relative_to(path).as_posix())
    return TextFiles(path, files, +skipped)


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    """The largest first; equal ones by name."""
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))


def _is_binary(file: Path) -> bool:
    with readable(file), file.open("rb") as opened:
        beginning = opened.read(BEGINNING)
    # UTF-16 is text that can be converted, which reading it says.
    return b"\0" in beginning and not beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
