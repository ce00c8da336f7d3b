"""What becomes of a conversation that is longer than `max_length`: one named policy, in messages or tokens."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

from lit_alignment.data.encoding.messages import Message

Policy = Literal["drop", "error", "keep_start", "keep_end", "middle"]
Unit = Literal["messages", "tokens"]


def shorten_messages(
    messages: Sequence[Message],
    policy: Literal["keep_start", "keep_end", "middle"],
    fits: Callable[[list[Message]], bool],
    ends: Callable[[Message], bool],
) -> list[Message] | None:
    """The longest conversation that fits and keeps whole messages, or None.

    A leading system message always stays. `keep_start` removes from the end, `keep_end` from the start, and
    `middle` removes what follows the first exchange. What is left opens as the conversation did, with a
    message that is not a response, and its last message satisfies `ends`.

    Args:
        messages: The conversation, too long as it is.
        policy: Which messages to keep.
        fits: Whether a shorter conversation is within the limit; more messages never fit better than fewer.
        ends: Whether a conversation may end with this message.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    rest = list(messages[len(system) :])
    starts = [i for i in range(1, len(rest)) if rest[i]["role"] == "user"]
    if policy == "keep_start":
        stops = [i for i in range(len(rest) - 1, 0, -1) if ends(rest[i - 1])]
        candidates = [system + rest[:stop] for stop in stops]
    elif policy == "keep_end":
        candidates = [system + rest[start:] for start in starts]
    else:
        first = starts[0] if starts else len(rest)
        candidates = [system + rest[:first] + rest[start:] for start in starts[1:]]
    # Candidates get shorter from left to right, so the first that fits is the longest.
    index = bisect_left(range(len(candidates)), True, key=lambda i: fits(candidates[i]))
    return candidates[index] if index < len(candidates) else None


def shorten_tokens(
    length: int, policy: Literal["keep_start", "keep_end", "middle"], max_length: int, pinned: int
) -> list[tuple[int, int]]:
    """Ranges of token positions to keep, `max_length` in all.

    Args:
        length: Number of tokens, more than `max_length`.
        policy: Which end to keep, or both.
        max_length: Number of tokens to keep.
        pinned: Length of the system message at the start, which stays; it is cut only if it alone is too long.
    """
    pinned = min(pinned, max_length)
    room = max_length - pinned
    match policy:
        case "keep_start":
            return [(0, max_length)]
        case "keep_end":
            return [(0, pinned), (length - room, length)]
        case "middle":
            head = pinned + (room + 1) // 2
            return [(0, head), (length - (max_length - head), length)]
