"""What a conversion writes: a YAML or a script, opened by comments that say what to know."""

import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_alignment.tools.convert.settings import Notes

WIDTH = 120


@dataclass
class Document:
    """One file to write.

    Args:
        command: The command that takes it.
        purpose: What it is for.
        content: The configuration, or the line of a script.
        remarks: What the reader should know besides the notes.
    """

    command: str
    purpose: str
    content: dict[str, Any] | str
    remarks: list[str]

    @property
    def suffix(self) -> str:
        """The ending of its file."""
        return ".sh" if isinstance(self.content, str) else ".yaml"

    def how_to_run(self, path: Path) -> str:
        """The command line that uses the file."""
        where = shlex.quote(str(path))
        return f"sh {where}" if isinstance(self.content, str) else f"lit-alignment {self.command} --config {where}"

    def text(self, path: Path, source: Path, notes: Notes) -> str:
        """The file's text.

        Args:
            path: Where it will be.
            source: The file that was converted.
            notes: What to say at its head.
        """
        head = [*_line("# Purpose:  ", f"{self.purpose}, converted from {source.name} of turbo-alignment")]
        head += _line("# Command:  ", self.how_to_run(path))
        for title, lines in (
            ("Remarks", self.remarks),
            ("Works otherwise than there", notes.warnings),
            ("Not carried over", notes.left_out),
            ("Unknown keys, not carried over", notes.unknown),
        ):
            if lines:
                head += ["#", f"# {title}:", *[part for line in lines for part in _line("#  - ", line)]]
        if isinstance(self.content, str):
            return "\n".join([*head, self.content, ""])
        body = yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True, width=WIDTH)
        return "\n".join([*head, body])


def _line(start: str, text: str) -> list[str]:
    """A comment, wrapped; words are never broken, so that paths can be copied."""
    rest = "#" + " " * (len(start) - 1)
    text = " ".join(text.split())
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
