"""What a chat template does with every conversation, found on short ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lit_alignment.data.encoding.marks import Template, common_prefix, mark, sample_call
from lit_alignment.data.encoding.messages import Message
from lit_alignment.errors import TemplateError

THINK = r"(?:<\|?(?:START_)?(?:\w+:)?think(?:ing)?\|?>|\[THINK\])"
THINK_END = r"(?:<\|?(?:/|END_|/\w+:)think(?:ing)?\|?>|\[/THINK\])"
EMPTY_THINKING = re.compile(rf"\s*(?:{THINK}\s*)?{THINK_END}\s*", re.IGNORECASE)
THINKING = re.compile(rf"\s*(?:{THINK})?.*?{THINK_END}\s*", re.IGNORECASE | re.DOTALL)
PROMPT_BLOCK = re.compile(  # at the end of a prompt
    rf"(?:{THINK}\s*(?:{THINK_END}\s*)?|{THINK_END}\s*|<\|channel>thought\s*(?:<channel\|>)?\s*)\Z", re.IGNORECASE
)


@dataclass(frozen=True)
class Closings:
    """What a template writes behind responses.

    Args:
        tokens: Special tokens that belong to the end of a turn.
        stops: Those of them that end it, after others that may stand inside of a response.
        plain: All that stands behind every response, the last one too.
        added: What ends a turn where the template leaves that to the next message; "" if it always does itself.
        added_call: The same behind a tool call.
    """

    tokens: frozenset[str] = frozenset()
    stops: frozenset[str] = frozenset()
    plain: str = ""
    added: str = ""
    added_call: str = ""


class TemplateProbe:
    """What a template writes around responses, whatever they say.

    Args:
        template: Renders conversations.
        special: Matches the tokenizer's special tokens.
        eos: Its EOS token, or "".
        bos: Its BOS token, or "".
        tools: What conversations have as tools.
    """

    def __init__(
        self, template: Template, special: re.Pattern[str], eos: str, bos: str, tools: Sequence[Any] = ()
    ) -> None:
        """Keep the template; conversations are rendered as they are needed."""
        self.template, self.special, self.eos, self.bos = template, special, eos, bos
        self.tools = list(tools)

    @cached_property
    def header(self) -> str:
        """What a prompt ends with to ask for a response, but for a think block."""
        asked: list[Message] = [{"role": "user", "content": "a"}]
        try:
            text, prompt = (self.template.render(asked, self.tools, ask) for ask in (False, True))
        except TemplateError:
            return ""
        return without_block(prompt.removeprefix(text)) if prompt.startswith(text) else ""

    @cached_property
    def empty_thinking(self) -> str:
        """The empty think block, or its end, that the template writes between a prompt and an answer; mostly "" ."""
        asked: list[Message] = [{"role": "user", "content": "a"}]
        try:
            prompt = self.template.render(asked, self.tools, True)
            marked = mark(self.template, [*asked, {"role": "assistant", "content": "b"}], self.tools)
        except TemplateError:
            return ""
        begin, opened = common_prefix(prompt, marked.text), marked.first(1, "open")
        between = marked.text[begin:opened].removeprefix(self.header)
        return between if EMPTY_THINKING.fullmatch(between) else ""

    @cached_property
    def prompt_block(self) -> str:
        """What a prompt ends with that the text of an answer without reasoning lacks; mostly "" ."""
        return self._block([])

    @cached_property
    def history_block(self) -> str:
        """What a prompt ends with that the text lacks when the conversation has gone on; mostly "" ."""
        return self._block([{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}])

    def _block(self, later: list[Message]) -> str:
        asked: list[Message] = [{"role": "user", "content": "a"}]
        try:
            prompt = self.template.render(asked, self.tools, True)
            text = self.template.render([*asked, {"role": "assistant", "content": "b"}, *later], self.tools, False)
        except TemplateError:
            return ""
        base = without_block(prompt)
        return prompt[len(base) :] if text.startswith(base) and not text.startswith(prompt) else ""

    @cached_property
    def refuses_system(self) -> bool:
        """Whether the template takes a question, but not behind a system message."""
        asked: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
        try:
            self.template.render(asked[1:], self.tools, True)
        except TemplateError:
            return False
        try:
            self.template.render(asked, self.tools, True)
        except TemplateError:
            return True
        return False

    @cached_property
    def closings(self) -> Closings:
        """What the template writes behind responses, found on short conversations."""
        found = self._behind_turns()
        if found is None:
            return Closings(added=self.eos, added_call=self.eos)
        closing, tail, between = found
        mid, final = self.special.findall(closing), self.special.findall(tail)
        plain = closing[: self.outside_special(closing, common_prefix(closing, tail))]
        headers = [token for token in self.special.findall(between) if token not in (self.bos, self.eos)]
        calls, added_call = self._call_closings(mid[-1:])
        added = ""
        if final:  # the last turn is closed: by what closes others too, or by a token of its own
            shared = [a for a, b in zip(mid, final, strict=False) if a == b]
            own = shared or ([self.eos] if self.eos in final else final[:1])
            tokens, stops = [*own, *mid], own[-1:]
        elif mid:  # turns are closed when the next message comes
            tokens, stops = mid, mid[-1:]
            added = closing[: closing.rindex(mid[-1]) + len(mid[-1])]
        elif headers and not closing.strip():  # nothing closes them but the next header
            tokens, stops, plain = headers[:1], headers[:1], ""
            added = between[: between.index(headers[0]) + len(headers[0])]
        elif plain.strip() or (plain and not self.eos):  # a text does
            tokens, stops = [], []
        else:
            tokens, stops = [self.eos], [self.eos]
            added = "" if plain else self.eos
        return Closings(frozenset(tokens + calls), frozenset(stops + calls), plain, added, added_call or added)

    def _behind_turns(self) -> tuple[str, str, str] | None:
        """What closes a turn, what stands behind the last one, and all that stands between a turn and the next text."""
        texts = [("user", "Aq"), ("assistant", "Bq"), ("user", "Cq"), ("assistant", "Dq")]
        try:
            marked = mark(self.template, [{"role": role, "content": text} for role, text in texts], self.tools)
        except TemplateError:
            return None
        ends = [marked.end(1, 0), marked.first(2, "open"), marked.end(3, 0), marked.first(0, "open")]
        if None in ends:
            return None
        behind, header, tail_at, opened = (int(end or 0) for end in ends)
        between, tail, head = marked.text[behind:header], marked.text[tail_at:], marked.text[:opened]
        closing = tail if tail.strip() and between.startswith(tail) else between[: self._header_at(head, between)]
        alike = between[: self.outside_special(between, common_prefix(between, tail))]
        if self.eos and self.eos in alike[len(closing) :]:  # what follows it stands at the end of every text
            closing = tail = alike[: alike.rindex(self.eos) + len(self.eos)]
        return closing, tail, between

    def _header_at(self, head: str, between: str) -> int:
        """Where the header of the next message begins in what stands between two turns."""
        opening = self.special.match(self.header)
        if opening is not None and opening[0] in between:  # the headers of all roles begin alike
            return between.rindex(opening[0])
        shared = common_prefix(head[::-1], between[::-1])
        position = len(between) - shared
        cut = next((t for t in self.special.finditer(between) if t.start() < position < t.end()), None)
        return position if cut is None else cut.end()

    def _call_closings(self, stops: list[str]) -> tuple[list[str], str]:
        """Special tokens that close a turn of tool calls, and what to add where only the next message does."""
        ask: Message = {"role": "user", "content": "Aq"}
        asked: list[Message] = [ask, {"role": "assistant", "content": "", "tool_calls": [sample_call("f")]}]
        result: Message = {"role": "tool", "name": "f", "tool_call_id": "call00000", "content": "c"}
        last: Message = {"role": "assistant", "content": "Dq"}
        try:
            alone = mark(self.template, asked, self.tools)
            whole = mark(self.template, [*asked, result, last], self.tools)
        except TemplateError:
            return [], ""
        end, later = alone.end(1, 1), whole.end(1, 1)
        opened = whole.first(2, "open")
        if end is None or later is None or opened is None:
            return [], ""
        tail, between = alone.text[end:], whole.text[later:opened]
        begin = self.outside_special(between, common_prefix(between, tail))
        rest = list(self.special.finditer(between, begin))
        if (stop := next((token for token in rest if token[0] in stops), None)) is not None:
            return [stop[0]], between[begin : stop.end()]
        final = list(self.special.finditer(tail))
        if any(token[0] == self.eos for token in final):
            return [self.eos], ""
        if final and not tail[final[-1].end() :].strip():
            return [final[-1][0]], ""
        return ([rest[0][0]], between[begin : rest[0].end()]) if rest else ([], "")

    def outside_special(self, text: str, position: int) -> int:
        """The position, or the beginning of the special token that it would cut."""
        for each in self.special.finditer(text, max(0, position - 100), position + 100):
            if each.start() < position < each.end():
                return each.start()
        return position


def without_block(prompt: str) -> str:
    """A prompt without the think block at its end."""
    found = PROMPT_BLOCK.search(prompt)
    return prompt if found is None else prompt[: found.start()]
