"""What goes to a terminal: texts of records and files as they read, and nothing in them that a terminal obeys."""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters but for tabs and line ends, what turns the direction of writing, and halves of surrogate pairs.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""A text in which what a terminal would obey is written as an escape, such as \x1b."""
    return OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


class Terminal(Console):
    """A console that prints texts as they are: without markup in them, and with escapes for what it would obey."""

    def __init__(self, **settings: Any) -> None:
        """Take brackets and colons as text."""
        super().__init__(markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of what is printed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
