"""What a conversion writes: a YAML or a script, opened by comments that say what to know."""

import shlex
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_alignment.tools.convert.settings import Extras, Notes, Settings

WIDTH = 120
TITLES = ("Remarks", "Works otherwise than there", "Not carried over", "Unknown keys, not carried over")


@dataclass(frozen=True)
class Method:
    """What is trained, or predicts."""

    name: str  # of our classes, before Module and DataModule
    purpose: str
    scores: bool = False  # whether sequences are scored, instead of tokens trained and prompts answered
    # What no other method has: for the whole old configuration, its part about one model, and the run's folder.
    further: Callable[[Settings, Settings, str], Extras] = lambda top, old, folder: ({}, {})
    remarks: tuple[str, ...] = ()  # what to know besides the notes
    model: str = "model_settings"  # where the language model's settings stand
    compares: str = ""  # "pairs" or "responses", of which only what follows the prompt counts

    def configuration(
        self, seed: int, folder: str, trainer: dict[str, Any], module: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Our configuration, of the run's folder, further keys of the trainer, and arguments of our classes."""
        return {
            "seed_everything": seed,
            "trainer": {"default_root_dir": folder, **trainer},
            "model": {"class_path": f"lit_alignment.{self.name}Module", "init_args": module},
            "data": {"class_path": f"lit_alignment.{self.name}DataModule", "init_args": {**data, "seed": seed}},
        }


@dataclass
class Document:
    """One file to write."""

    command: str  # of ours, which takes it
    purpose: str
    content: dict[str, Any] | str  # the configuration, or the line of a script
    remarks: list[str] = field(default_factory=list)  # what to know besides the notes

    @property
    def suffix(self) -> str:
        """The ending of its file."""
        return ".sh" if isinstance(self.content, str) else ".yaml"

    def how_to_run(self, path: Path) -> str:
        """The command line that uses the file."""
        where = shlex.quote(str(path))
        return f"sh {where}" if isinstance(self.content, str) else f"lit-alignment {self.command} --config {where}"

    def text(self, path: Path, source: Path, notes: Notes) -> str:
        """The text of its file, which will be at `path`: what was converted from `source`, below what to know."""
        head = _comment("# Purpose:  ", f"{self.purpose}, converted from {source.name} of turbo-alignment")
        head += _comment("# Command:  ", self.how_to_run(path))
        for title, lines in zip(TITLES, (self.remarks, *notes.groups()), strict=True):
            if lines:
                head += ["#", f"# {title}:", *[part for line in lines for part in _comment("#  - ", line)]]
        if isinstance(self.content, str):
            return "\n".join([*head, self.content, ""])
        body = yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True, width=WIDTH)
        return "\n".join([*head, body])


def script(purpose: str, *command: str, remarks: Iterable[str] = ()) -> Document:
    """A file that runs one command of ours, its name first."""
    return Document(command[0], purpose, shlex.join(["lit-alignment", *command]), [*remarks])


def _comment(start: str, text: str) -> list[str]:
    """A comment, wrapped; words are never broken, so that paths can be copied."""
    rest = "#" + " " * (len(start) - 1)
    text = " ".join(text.split())
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
