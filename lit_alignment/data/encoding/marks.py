"""Where a template puts the parts of messages: found by marks in them, and checked against the text without marks."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lit_alignment.data.encoding.messages import Message
from lit_alignment.errors import TemplateError

Part = Literal["open", "close", "call", "reason", "reasoned"]  # content and reasoning have two ends, a call has one
PARTS: tuple[Part, ...] = ("open", "close", "call", "reason", "reasoned")
# What is tried if a template looks at what a mark changes; the mark of a call stands in its name, or in its arguments.
ATTEMPTS = [(PARTS, True), (PARTS, False), *(((part,), True) for part in PARTS), (("call",), False)]
ENDS: dict[str, tuple[Part, Part]] = {"content": ("open", "close"), "reasoning_content": ("reason", "reasoned")}
TOOLS = -1  # in place of a message's number
# A mark is a letter for the part, one for the message and one for which of its calls: printable, without case, and no
# white space, so that a template trims, writes as JSON and compares as before. Syllables of Vai and Yi; JSON may escape
# them.
KINDS = [0xA500 + 8 * shift for shift in range(30)]
VAI = re.compile("[\ua500-\ua5ff]")
NUMBERS, MOST = 0xA000, 1165


class Template(Protocol):
    """What the encoder needs of a template.

    Args:
        ending: What closes a training conversation, whoever speaks last; "" for nothing.
        looks_at: Matches in texts what the template may look for in them.
    """

    ending: str
    looks_at: re.Pattern[str]

    def render(self, messages: list[Message], tools: list[Any], prompt: bool) -> str:
        """The text of a conversation; with `prompt`, up to where the next response begins."""
        ...

    def reads(self, variable: str) -> bool:
        """Whether the template looks at a variable."""
        ...

    def remarks(self) -> list[str]:
        """What about the template somebody should know before training."""
        ...


@dataclass(frozen=True)
class Marked:
    """A rendered conversation, and where its messages stand.

    Args:
        text: As rendered, without marks.
        places: By message and part, positions in the text where the template put it; nothing if it is left out. Of each
            call the first alone, since a template may name it again beside its result.
    """

    text: str
    places: dict[int, dict[Part, list[int]]] = field(default_factory=dict)

    def first(self, number: int, part: Part) -> int | None:
        """Where a part of a message stands first, or None."""
        return next(iter(self.places.get(number, {}).get(part, ())), None)

    def end(self, number: int, calls: int) -> int | None:
        """Where the last part of a message that has this many calls stands, or None."""
        found = self.places.get(number, {})
        ends = [*found.get("reasoned", [])[:1], *found.get("close", [])[:1], *found.get("call", [])[:calls]]
        return max(ends, default=None)

    def next_after(self, number: int, position: int) -> int:
        """The first place of any later message from a position on, or the end of the text."""
        later = (places for other, parts in self.places.items() if other > number for places in parts.values())
        return min((place for places in later for place in places if place >= position), default=len(self.text))


def mark(template: Template, messages: list[Message], tools: list[Any], prompt: bool = False) -> Marked:
    """Render a conversation, and find its messages.

    Raises:
        TemplateError: If the template refuses the conversation.
    """
    text = template.render(messages, tools, prompt)
    marks = _Marks(messages, tools)
    everything = [(number, part) for number in range(TOOLS, len(messages)) for part in PARTS]
    found = marks.find(template, everything, prompt, text)
    if found is None:  # the template looks at what a mark changes: each message by itself, then each part
        found = {}
        for number in range(TOOLS, len(messages)):
            for parts, in_name in ATTEMPTS:
                own = marks.find(template, [(number, part) for part in parts], prompt, text, in_name)
                if own is not None:
                    found[number] = {**found.get(number, {}), **own.get(number, {})}
                    if parts is PARTS:
                        break
    return Marked(text, found)


class _Marks:
    """Marks for the messages of one conversation."""

    def __init__(self, messages: list[Message], tools: list[Any]) -> None:
        if len(messages) >= MOST:
            raise TemplateError(f"the conversation has {len(messages)} messages; {MOST - 1} is the most")
        self.messages, self.tools = messages, tools
        letters = {letter for text in _texts([messages, tools]) for letter in VAI.findall(text)}
        taken = {(ord(letter) - KINDS[0]) // 8 for letter in letters}
        self.kinds = next((kind for shift, kind in enumerate(KINDS) if shift not in taken), KINDS[0])
        number = f"([{chr(NUMBERS)}-{chr(NUMBERS + MOST)}])"
        escaped = r"\\u(a[0-4][0-9a-f][0-9a-f])"
        self.pattern = re.compile(
            rf"([{chr(self.kinds)}-{chr(self.kinds + 7)}]){number}{number}"
            rf"|\\u({self.kinds >> 4:x}[0-9a-f]){escaped}{escaped}"
        )

    def find(
        self, template: Template, wanted: Sequence[tuple[int, Part]], prompt: bool, text: str, in_name: bool = True
    ) -> dict[int, dict[Part, list[int]]] | None:
        """Where the template puts these parts, or None if it writes another text with marks than without."""
        chosen = set(wanted)
        messages = [self._marked(number, message, chosen, in_name) for number, message in enumerate(self.messages)]
        tools = self.tools
        if tools and (TOOLS, "call") in chosen:
            tools = [_called(tools[0], self._mark(TOOLS, "call"), in_name), *tools[1:]]
        try:
            rendered = template.render(messages, tools, prompt)
        except TemplateError:
            return None
        found: dict[int, dict[Part, list[int]]] = {}
        pieces, position, begin, calls = [], 0, 0, set()
        for each in self.pattern.finditer(rendered):
            pieces.append(rendered[begin : each.start()])
            position, begin = position + each.start() - begin, each.end()
            letters = map(ord, each.groups()[:3]) if each[1] else (int(code, 16) for code in each.groups()[3:])
            kind, number, call = letters
            part = PARTS[kind - self.kinds]
            if part == "call" and (number, call) in calls:
                continue
            found.setdefault(number - NUMBERS - 1, {}).setdefault(part, []).append(position)
            if part == "call":
                calls.add((number, call))
        return found if "".join([*pieces, rendered[begin:]]) == text else None

    def _mark(self, number: int, part: Part, call: int = 0) -> str:
        return chr(self.kinds + PARTS.index(part)) + chr(NUMBERS + number + 1) + chr(NUMBERS + call)

    def _marked(self, number: int, message: Message, chosen: set[tuple[int, Part]], in_name: bool) -> Message:
        message = dict(message)
        for key, (opening, closing) in ENDS.items():
            value = message.get(key)
            if isinstance(value, str) and value:
                before = self._mark(number, opening) if (number, opening) in chosen else ""
                after = self._mark(number, closing) if (number, closing) in chosen else ""
                message[key] = _within(value, before, after)
        if message.get("tool_calls") and (number, "call") in chosen:
            calls = enumerate(message["tool_calls"])
            message["tool_calls"] = [_called(call, self._mark(number, "call", i), in_name) for i, call in calls]
        return message


def _called(value: Any, mark: str, in_name: bool) -> Any:
    """A call or tool with a mark in its function's name, or in the first text of its arguments or description."""
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("function"), dict):
        return {**value, "function": _called(value["function"], mark, in_name)}
    for key in ("name",) if in_name else ("arguments", "description"):
        if key in value:
            return {**value, key: _with_mark(value[key], mark)}
    return value


def _with_mark(value: Any, mark: str) -> Any:
    """A text, or the first text of an object, with a mark behind it; anything else as it is."""
    if isinstance(value, dict):
        key = next((key for key, each in value.items() if isinstance(each, str)), None)
        return value if key is None else {**value, key: value[key] + mark}
    return value + mark if isinstance(value, str) else value


def sample_call(name: str) -> dict[str, Any]:
    """A tool call by which a template's ways are found out."""
    return {"id": "call00000", "type": "function", "function": {"name": name, "arguments": {"x": "y"}}}


def _within(text: str, before: str, after: str) -> str:
    """A text with marks inside of the white space around it, which a template may trim."""
    if not text.strip():  # where a template trims it away, the marks change what it writes, and are not believed
        return before + text + after
    start = len(text) - len(text.lstrip())
    end = len(text.rstrip())
    return text[:start] + before + text[start:end] + after + text[end:]


def _texts(value: Any) -> Iterable[str]:
    """All texts inside of a value."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(each)


def common_prefix(first: str, second: str) -> int:
    """Number of characters that two texts share at their beginning."""
    if second.startswith(first):
        return len(first)
    shortest = min(len(first), len(second))
    # Bisection over slices compares as fast as the machine can; texts are long and mostly equal.
    return bisect_left(range(1, shortest + 1), True, key=lambda n: first[:n] != second[:n])
