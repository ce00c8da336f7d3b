"""Differences between two texts, word by word."""

import re
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Literal

Change = Literal["same", "ins", "del"]
MOST_WORDS = 1200  # of each text; above, a comparison is neither fast nor read
ALIKE = 0.3  # below this share of common words a difference is noise


@lru_cache(maxsize=4096)  # a page is written anew at each validation, with the answers of all before
def word_changes(reference: str, text: str) -> tuple[tuple[Change, str], ...]:
    """A text in pieces: what the reference has too, what it has not ("ins"), and what of it is missing ("del").

    The pieces but for "del" are the text. It is one piece where it has little in common with the reference, or where
    one of both is very long.

    Args:
        reference: What should be there.
        text: What is there.
    """
    old, new = _words(reference), _words(text)
    if not old or not new or reference.strip() == text.strip() or max(len(old), len(new)) > MOST_WORDS:
        return (("same", text),)
    # Frequent words of long texts begin no match (`autojunk`): a text that repeats itself would take 15 seconds.
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new])
    if matcher.ratio() < ALIKE:
        return (("same", text),)
    pieces: list[tuple[Change, str]] = []
    for kind, old_from, old_to, new_from, new_to in matcher.get_opcodes():
        if kind != "equal" and old_to > old_from:
            pieces.append(("del", "".join(old[old_from:old_to])))
        if new_to > new_from:
            pieces.append(("same" if kind == "equal" else "ins", "".join(new[new_from:new_to])))
    return tuple(pieces)


def _words(text: str) -> list[str]:
    """Words and signs, each with the spaces before it; the last one with those behind it."""
    return re.findall(r"\s*(?:\w+|[^\w\s])(?:\s+$)?", text)
