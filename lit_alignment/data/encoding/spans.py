"""Where the responses stand in a rendered conversation, from the end of their prompt to the token that stops them.

Stock templates carry no generation tags, and the assistant masks of transformers are all zero under them. So a response
is found by marks in its own text; its prompt, rendered as in predict, says where it begins; and what closes it is
what a template writes behind responses whatever they say, which four short conversations show.
"""

import re
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from lit_alignment.data.encoding.example import HISTORY_DIFFERS, Dropped
from lit_alignment.data.encoding.marks import TOOLS, Marked, Template, common_prefix, mark
from lit_alignment.data.encoding.messages import TEMPLATE_KEYS, Message, Record
from lit_alignment.data.encoding.probes import EMPTY_THINKING, THINK, TemplateProbe, without_block
from lit_alignment.data.encoding.shapes import Rendered, Shape, Turn
from lit_alignment.errors import TemplateError

MOST_SHAPES = 1024
TEXT = {"type": "string", "description": "A text."}
PARAMETERS = {"type": "object", "properties": {"x": TEXT}, "required": ["x"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "What it does.", "parameters": PARAMETERS}}


class HistoryDiffers(TemplateError):
    """What stands before a response in the conversation is not what the model would have seen."""


class NotRendered(TemplateError):
    """The template leaves out a part of the conversation."""


class Locator:
    """Finds responses in what a template renders."""

    def __init__(
        self,
        template: Template,
        special: re.Pattern[str],
        eos: str,
        bos: str,
        train_empty_thinking: bool,
        add_stop: bool,
        prompt_block: Literal["keep", "drop", "train"] = "keep",
    ) -> None:
        """Keep the template.

        Args:
            template: Renders conversations.
            special: Matches the tokenizer's special tokens.
            eos: Its EOS token, or "".
            bos: Its BOS token, or "".
            train_empty_thinking: Whether an empty think block before an answer is trained.
            add_stop: Whether what ends a turn is added behind the last response, where the template does not write it.
            prompt_block: What becomes of a think block that stands in prompts alone.
        """
        self.template, self.special = template, special
        self.probe = TemplateProbe(template, special, eos, bos)
        self.tool_probe = TemplateProbe(template, special, eos, bos, [TOOL])
        self.train_empty_thinking, self.add_stop = train_empty_thinking, add_stop
        self.asked_block = prompt_block
        self.shapes: dict[tuple[tuple[str, ...], tuple[int, ...]], Shape] = {}

    def locate(self, messages: list[Message], tools: list[Any], wanted: list[int]) -> Rendered:
        """The text of a finished conversation and the range of each wanted message in it.

        Raises:
            HistoryDiffers: If the prompt of a wanted response is not what stands before it.
            NotRendered: If the template leaves out tools, a call, or a wanted message.
            TemplateError: If a wanted message cannot be found.
        """
        kind = (tuple(message["role"] for message in messages), tuple(wanted))
        is_plain = not tools and all(map(self._is_plain, messages))
        if is_plain and (shape := self.shapes.get(kind)) is not None:
            filled = shape.fill(messages, self.template.render(messages, tools, False))
            if filled is not None:
                return filled
        marked = mark(self.template, messages, tools)
        self._check(messages, tools, marked, wanted)
        found = self._found(messages, tools, marked, wanted)
        if is_plain and len(self.shapes) < MOST_SHAPES and (shape := Shape.of(messages, marked, found)) is not None:
            self.shapes[kind] = shape
        return found

    def locate_last(self, messages: list[Message], tools: list[Any]) -> Rendered:
        """A finished conversation as the model would see it at its last response: the prompt, then the response.

        Raises:
            NotRendered: If the template leaves out tools, a call, or the response.
            TemplateError: If the response cannot be found.
        """
        last = len(messages) - 1
        try:
            return self.locate(messages, tools, [last])
        except HistoryDiffers:
            pass
        whole = mark(self.template, messages, tools)
        asked = mark(self.template, messages[:last], tools, prompt=True)
        start = self._response_at(messages, tools, whole, asked)
        seen = without_block(asked.text)
        if block := asked.text[len(seen) :]:
            empty = EMPTY_THINKING.match(whole.text, start)
            if whole.text.startswith(block, start):
                seen, start = asked.text, start + len(block)
            elif self.block_end:
                seen, start = asked.text + self.block_end, start if empty is None else empty.end()
        text, shift = seen + whole.text[start:], len(seen) - start
        places = {
            last: {p: [at + shift for at in found] for p, found in whole.places.get(last, {}).items()},
            **{number: found for number, found in asked.places.items() if number < last},
        }
        composed = Marked(text, places)
        self._check(messages, tools, composed, [last])
        return self._found(messages, tools, composed, [last])

    def _response_at(self, messages: list[Message], tools: list[Any], whole: Marked, asked: Marked) -> int:
        """Where the last response begins in a conversation whose beginning is not its prompt."""
        last = len(messages) - 1
        first = min((min(found) for found in whole.places.get(last, {}).values()), default=len(whole.text))
        header = self._probe(tools).header
        before, behind = (each.end(last - 1, _calls(messages[last - 1])) for each in (asked, whole))
        tokens = list(self.special.finditer(header))
        for own in (header, header[tokens[-1].start() :] if tokens else ""):  # a prompt may say more than a header
            if own and own in whole.text[behind or 0 : first]:
                return whole.text.rindex(own, 0, first) + len(own)
        if before is None or behind is None:
            raise TemplateError(f"the chat template moves message {last - 1}, so the response behind it is not found")
        shared = common_prefix(asked.text[before:], whole.text[behind:])
        position = self._probe(tools).outside_special(whole.text, behind + shared)
        if behind + shared < len(whole.text) and shared < len(asked.text) - before:
            position = min(position, behind + self._probe(tools).outside_special(asked.text, before + shared) - before)
        return min(position, first)

    def starts(self, messages: list[Message], tools: list[Any]) -> tuple[str, list[int]]:
        """The prompt of a conversation, and where the responses in it begin; as in training, no token reaches over."""
        text, boundaries = self._responses(messages, tools, mark(self.template, messages, tools, prompt=True))
        return text.removesuffix(self.probe.prompt_block if self.asked_block == "drop" else ""), boundaries

    def _responses(self, messages: list[Message], tools: list[Any], marked: Marked) -> tuple[str, list[int]]:
        responses = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        boundaries = (self._boundary(messages, tools, number, marked) for number in responses)
        return marked.text, [boundary for boundary in boundaries if boundary is not None]

    def begun(self, messages: list[Message], tools: list[Any]) -> tuple[str, list[int]]:
        """A prompt that ends with the beginning of a response, and where the responses in it begin.

        Raises:
            TemplateError: If the template leaves out that beginning.
        """
        marked = mark(self.template, messages, tools)
        end = marked.first(len(messages) - 1, "close")
        if end is None:
            raise TemplateError("the chat template leaves out the beginning of the response to go on from")
        _, boundaries = self._responses(messages, tools, marked)
        return marked.text[:end], boundaries

    def _is_plain(self, message: Message) -> bool:
        """Whether a message is but a text, and one that no template would look at more closely."""
        content = message["content"]
        if not isinstance(content, str) or not content or content[0].isspace() or content[-1].isspace():
            return False
        extra = any(key in message for key in TEMPLATE_KEYS[2:])
        return not (extra or self.template.looks_at.search(content) or self.special.search(content))

    def _check(self, messages: list[Message], tools: list[Any], marked: Marked, wanted: list[int]) -> None:
        if tools and _is_named(tools[0]) and marked.first(TOOLS, "call") is None:
            raise NotRendered("the chat template has no place for tools")
        for number, message in enumerate(messages):
            calls = _calls(message)
            if len(marked.places.get(number, {}).get("call", [])) < calls:
                raise NotRendered(f"the chat template leaves out a tool call of message {number}")
            shown = marked.first(number, "open") is not None or marked.first(number, "close") is not None
            if number in wanted and not shown and (message.get("content") or "").strip():
                raise NotRendered(f"the chat template leaves out or rewrites the text of message {number}")

    def _found(self, messages: list[Message], tools: list[Any], marked: Marked, wanted: list[int]) -> Rendered:
        turns: dict[int, Turn] = {}
        text, added = marked.text, ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant" and number not in wanted:
                continue
            boundary = self._boundary(messages, tools, number, marked)
            if boundary is None:
                if number in wanted:
                    raise HistoryDiffers(f"the chat template renders what stands before message {number} differently")
                continue
            try:
                turn = self._turn(messages, number, boundary, marked, tools)
            except HistoryDiffers:
                if number in wanted:
                    raise
                continue
            if number == len(messages) - 1 and message["role"] == "assistant" and self.add_stop and not turn.closed:
                closings = self._probe(tools).closings
                added = closings.added_call if _calls(message) else closings.added
                text = _joined(text, added)
                turn = replace(turn, stop=max(turn.stop, len(text)), closed=True) if added else turn
            turns[number] = turn
        if self.template.ending and not text.rstrip().endswith(self.template.ending):
            text += self.template.ending
            if (turn_last := turns.get(len(messages) - 1)) is not None:
                turns[len(messages) - 1] = replace(turn_last, stop=len(text), closed=True)
        return Rendered(text, turns, added)

    def _boundary(self, messages: list[Message], tools: list[Any], number: int, marked: Marked) -> int | None:
        """Where the prompt of a message ends in the text, or None if the text before it is another than the prompt."""
        text = marked.text
        if messages[number]["role"] != "assistant":
            return marked.first(number, "open")
        try:
            prompt = self.template.render(messages[:number], tools, True)
        except TemplateError:
            if number:
                raise
            return marked.first(0, "open")
        shared = common_prefix(prompt, text)
        if shared == len(prompt):
            return shared
        if number == 0:
            return marked.first(0, "open")
        # A prompt may end with a think block that the text lacks; in nothing else may they differ.
        base = without_block(prompt)
        rest = prompt[len(base) :]
        if (self.block_end and rest == self.probe.prompt_block) or (
            self.asked_block == "train" and rest == self.probe.history_block != self.probe.prompt_block
        ):
            return None
        return len(base) if rest and text.startswith(base) else None

    def _turn(self, messages: list[Message], number: int, boundary: int, marked: Marked, tools: list[Any]) -> Turn:
        message, text = messages[number], marked.text
        calls = _calls(message)
        opened = marked.first(number, "open")
        start = boundary
        if message["role"] == "assistant" and self.probe.header and text.startswith(self.probe.header, boundary):
            start += len(self.probe.header)
        keeps_empty = self.train_empty_thinking or bool(self.block_end)
        if message["role"] == "assistant" and not keeps_empty and marked.first(number, "reason") is None:
            block = EMPTY_THINKING.match(text, start)
            if self.probe.empty_thinking and text.startswith(self.probe.empty_thinking, start):
                start += len(self.probe.empty_thinking)
            elif block is not None and (opened is None or block.end() <= opened):
                start = block.end()
        end = max(marked.end(number, calls) or start, start)
        not_ours = [other for other in marked.places if other < 0 or messages[other]["role"] != "assistant"]
        others = [marked.places[other] for other in not_ours if other != number]
        if any(start <= place < end for parts in others for places in parts.values() for place in places):
            raise HistoryDiffers(f"the chat template writes other messages inside of message {number}")
        content = message.get("content") or ""
        space = content[len(content.rstrip()) :]
        if not calls and space != content and text.startswith(space, end):
            end += len(space)  # the template has not trimmed it
        limit = marked.next_after(number, end)
        followed = number + 1 in marked.places or limit == len(text)
        closing = self._closing(text, end, limit, calls > 0, followed, tools)
        if closing is None and calls:  # where its arguments end is certain only at the end of the text
            if limit < len(text):
                raise HistoryDiffers(f"where the tool call of message {number} ends cannot be told from what follows")
            end = len(text.rstrip())
        if closing is None:
            return Turn(boundary, start, end, end, closed=False)
        first, stop = closing
        return Turn(boundary, start, first if calls else end, stop, closed=True)

    def _closing(
        self, text: str, end: int, limit: int, is_call: bool, followed: bool, tools: list[Any]
    ) -> tuple[int, int] | None:
        """Begin and end of what closes a turn, looked for up to the next message; None if it is not there.

        The arguments of a call stand between its name, which is all that is found of it, and the closing; they may hold
        the text of a stop, so that the last one counts, unless a message without marks may stand there too.
        """
        closings = self._probe(tools).closings
        if closings.plain and not is_call and text.startswith(closings.plain, end):
            stop = end + len(closings.plain)
            return end, end + len(closings.plain.rstrip()) if self.special.search(closings.plain) else stop
        wanted = closings.stops if is_call else closings.tokens
        found = [token for token in self.special.finditer(text, end, limit) if token[0] in wanted]
        if not found:
            find = text.rfind if followed else text.find
            first = find(closings.plain, end, limit) if closings.plain and is_call else -1
            return None if first < 0 else (first, first + len(closings.plain))
        if is_call:
            token = found[-1] if followed else found[0]
            return token.start(), token.end()
        stop = found[0].end()
        for token in found[1:]:
            if text[stop : token.start()].strip():
                break
            stop = token.end()
        return found[0].start(), stop

    def _probe(self, tools: list[Any]) -> TemplateProbe:
        return self.tool_probe if tools else self.probe

    def remarks(self) -> list[str]:
        """What about prompts somebody should know before training."""
        if self.asked_block != "keep" or not (self.probe.prompt_block or self.probe.history_block):
            return []
        if not self.probe.prompt_block:
            return [
                f"prompts end with {self.probe.history_block!r}, which the template takes out of earlier responses. "
                "Set encoding.template.prompt_block to train (one example of each response, behind its own prompt)."
            ]
        plain = ", or its variables: {enable_thinking: false}" if self.template.reads("enable_thinking") else ""
        return [
            f"prompts end with {self.probe.prompt_block!r}, which the text of an answer without reasoning lacks. Set "
            f"encoding.template.prompt_block to drop (predict without it) or train (train behind it){plain}."
        ]

    @cached_property
    def block_end(self) -> str:
        """What closes the think block of a prompt, where answers are to be trained behind it."""
        opened = re.search(THINK, self.probe.prompt_block, re.IGNORECASE)
        if self.asked_block != "train" or opened is None:
            return ""
        tag = opened[0]
        return f"\n{tag.replace('START_', 'END_') if 'START_' in tag else f'{tag[0]}/{tag[1:]}'}\n\n"


def _joined(text: str, added: str) -> str:
    """A text with another behind it, whose white space is not repeated."""
    space = added[: len(added) - len(added.lstrip())]
    return (text.removesuffix(space) if space else text) + added


def dropped(record: Record, error: TemplateError, locator: Locator) -> Dropped:
    """The reason for which a record that its template cannot render as it should is dropped."""
    match error:
        case HistoryDiffers():
            reason, fix = HISTORY_DIFFERS, "set encoding.split_turns to auto, for one example of each response"
        case NotRendered():
            reason, fix = "not_rendered", "give a template that writes it in encoding.template.file"
        case _:
            reason, fix = "template_error", "change the record, or give another encoding.template.file"
            if any(message["role"] == "system" for message in record.messages) and locator.probe.refuses_system:
                fix = "set encoding.ignore_system_prompt"
    return Dropped(reason, f"{record.where}: {error}; {fix}")


def _calls(message: Message) -> int:
    return len(message.get("tool_calls") or ())


def _is_named(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
