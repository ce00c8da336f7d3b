"""Special tokens in the texts of messages, where a tokenizer would read them as control tokens."""

import re
from collections.abc import Collection, Sequence
from typing import Literal

from lit_alignment.data.encoding.messages import Message
from lit_alignment.errors import RecordError

ZERO_WIDTH_SPACE = "\u200b"


def control_tokens(messages: Sequence[Message], special: re.Pattern[str], expected: Collection[str]) -> list[str]:
    """The special tokens in the texts of messages, but for those that belong there, such as placeholders of images."""
    texts = (message["content"] for message in messages if message["content"])
    return [token for text in texts for token in special.findall(text) if token not in expected]


def without_control_tokens(
    messages: Sequence[Message], found: Sequence[str], handling: Literal["escape", "error"], where: str
) -> list[Message]:
    """Messages whose control tokens are read as text: a zero-width space stands behind the first letter of each.

    Args:
        messages: Any.
        found: Their control tokens.
        handling: What to do.
        where: File and line.

    Raises:
        RecordError: If they are errors.
    """
    if handling == "error":
        raise RecordError(
            where,
            "",
            f"a text holds the control token {found[0]}",
            "Take it out, or set data's encoding.control_tokens to keep or escape.",
        )
    longest_first = sorted(set(found), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))

    def escape(token: re.Match[str]) -> str:
        return token[0][0] + ZERO_WIDTH_SPACE + token[0][1:]

    return [{**m, "content": m["content"] and pattern.sub(escape, m["content"])} for m in messages]
