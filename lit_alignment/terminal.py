"""What goes to a terminal: texts of records and files as they read, and nothing in them that a terminal obeys."""

import re
from typing import IO, Any

from rich.console import Console
from rich.text import Text

# Control characters but for tabs and line ends, what turns the direction of writing, and halves of surrogate pairs.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""A text in which what a terminal would obey is written as an escape, such as \x1b."""
    return OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


class Terminal(Console):
    """A console that prints texts as they are: without markup in them, and with escapes for what it would obey.

    A `Text` is printed as it was made; what it is made of goes through `printable` first.
    """

    def __init__(self, file: IO[str] | None = None, width: int | None = None, is_terminal: bool | None = None) -> None:
        """Take brackets and colons as text; where it prints, and how, is found out unless it is given."""
        super().__init__(markup=False, emoji=False, file=file, width=width, force_terminal=is_terminal)

    def render_str(self, text: str, **options: Any) -> Text:
        """What is printed of a text, and measured before: rich cuts what grows later."""
        return super().render_str(printable(text), **options)
