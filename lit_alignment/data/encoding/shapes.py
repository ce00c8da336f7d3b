"""Conversations of one shape: found with marks once, and from then on by what stands between their texts."""

from collections.abc import Sequence
from dataclasses import dataclass

from lit_alignment.data.encoding.marks import Marked
from lit_alignment.data.encoding.messages import Message


@dataclass(frozen=True)
class Turn:
    """Character range of one response.

    Args:
        boundary: Where the prompt for it ends; no token reaches over it.
        start: First character that is trained.
        content_end: One past the last character of the content; the end-of-turn text begins here.
        stop: One past the end-of-turn text.
        closed: Whether the text that stops the model stands there.
    """

    boundary: int
    start: int
    content_end: int
    stop: int
    closed: bool


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Args:
        text: All of it, with what was added behind the last response.
        turns: Ranges of the messages that were asked for, and of all responses whose prompt is a part of the text.
        added: What was added.
    """

    text: str
    turns: dict[int, Turn]
    added: str = ""


@dataclass(frozen=True)
class Shape:
    """What is alike in all conversations with the same roles, whose texts a template copies and does not look at.

    Args:
        pieces: Texts between those of the messages; one more than there are messages.
        order: The messages, as they stand in the text.
        anchors: For each turn its four positions, as a number of texts before it and a distance from the last of them.
        closed: The turns that are closed.
        added: What was added behind the last response.
        ending: How many characters stand behind what the template renders.
    """

    pieces: list[str]
    order: list[int]
    anchors: dict[int, list[tuple[int, int]]]
    closed: frozenset[int]
    added: str
    ending: int

    @classmethod
    def of(cls, messages: Sequence[Message], marked: Marked, found: Rendered) -> "Shape | None":
        """The shape of a conversation, or None if its texts do not stand in it as they are, once each."""
        spans = []
        for number, message in enumerate(messages):
            begins, ends = (marked.places.get(number, {}).get(part, []) for part in ("open", "close"))
            if len(begins) != 1 or len(ends) != 1 or marked.text[begins[0] : ends[0]] != message["content"]:
                return None
            spans.append((begins[0], ends[0], number))
        spans.sort()
        if not found.text.startswith(marked.text):
            return None
        begins = [0, *(end for _, end, _ in spans)]
        ends = [*(begin for begin, _, _ in spans), len(found.text)]
        if any(begin > end for begin, end in zip(begins, ends, strict=True)):
            return None
        anchors: dict[int, list[tuple[int, int]]] = {}
        for number, turn in found.turns.items():
            anchors[number] = []
            for position in (turn.boundary, turn.start, turn.content_end, turn.stop):
                before = sum(end <= position for _, end, _ in spans)
                if before < len(spans) and position > spans[before][0]:
                    return None  # inside of a text
                anchors[number].append((before, position - begins[before]))
        return cls(
            [found.text[begin:end] for begin, end in zip(begins, ends, strict=True)],
            [number for _, _, number in spans],
            anchors,
            frozenset(number for number, turn in found.turns.items() if turn.closed),
            found.added,
            len(found.text) - len(marked.text),
        )

    def fill(self, messages: Sequence[Message], text: str) -> Rendered | None:
        """Another conversation of this shape, or None if the template renders it in another way.

        Args:
            messages: The conversation.
            text: As the template renders it.
        """
        parts, ends, length = [self.pieces[0]], [0], len(self.pieces[0])
        for number, piece in zip(self.order, self.pieces[1:], strict=True):
            content = messages[number]["content"]
            parts += [content, piece]
            ends.append(length + len(content))
            length = ends[-1] + len(piece)
        filled = "".join(parts)
        if filled[: length - self.ending] != text:
            return None
        turns = {}
        for number, anchors in self.anchors.items():
            places = (ends[before] + distance for before, distance in anchors)
            boundary, start, content_end, stop = places
            turns[number] = Turn(boundary, start, content_end, stop, number in self.closed)
        return Rendered(filled, turns, self.added)
