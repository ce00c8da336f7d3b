"""From a conversation to its text, and where in that text each response stands.

Two back ends with one interface: the tokenizer's Jinja chat template (or a file), and a prefix and suffix around
each message. The assistant masks of transformers are not used: stock templates carry no generation tags and give
all-zero masks, so the places are recovered from renderings of prefixes and checked against the full one.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.encoding.messages import TEMPLATE_KEYS, Message, Role
from lit_alignment.errors import ConfigError, TemplateError

MARKER = "\u2021mark\u2021"  # put beside a content to find where the template places it
EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class TemplateConfig:
    """How a conversation becomes text.

    Args:
        file: A Jinja chat template to use instead of the tokenizer's own.
        variables: Extra variables for the Jinja template, such as {enable_thinking: false}.
        prefix: Text before each message, with {role} in it; selects the prefix/suffix form.
        suffix: Text after each message.
        role_names: What {role} becomes for system, user, assistant and tool.
        append_eos: In the prefix/suffix form, close a training conversation with the EOS token.
        train_empty_thinking: Also train the empty think block that some templates put before an answer.
    """

    file: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    prefix: str | None = None
    suffix: str | None = None
    role_names: dict[str, str] = field(default_factory=dict)
    append_eos: bool = True
    train_empty_thinking: bool = False

    def __post_init__(self) -> None:
        """Refuse a mixture of the two forms."""
        if (self.prefix is None) != (self.suffix is None):
            raise ConfigError("template: give 'prefix' and 'suffix' together.")
        if self.prefix is not None and self.file is not None:
            raise ConfigError("template: give 'file' or 'prefix' and 'suffix', not both.")


@dataclass(frozen=True)
class Turn:
    """Character range of one response.

    Args:
        start: First character that the model has to produce.
        content_end: One past the last character of the content; the end-of-turn text begins here.
        stop: One past the end-of-turn text.
    """

    start: int
    content_end: int
    stop: int


class Template(Protocol):
    """What the encoder needs of a template."""

    def render(self, messages: list[Message], tools: list[Any], prompt: bool) -> str:
        """The text of a conversation; with `prompt`, up to where the next response begins."""
        ...

    def turns(self, messages: list[Message], tools: list[Any], wanted: list[int]) -> tuple[str, dict[int, Turn]]:
        """The text of a finished conversation and the range of each wanted message in it."""
        ...


def build_template(config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that the configuration asks for.

    Raises:
        ConfigError: If the tokenizer has no chat template and none is given.
    """
    if config.prefix is not None and config.suffix is not None:
        return PrefixSuffixTemplate(config, tokenizer)
    source = tokenizer.chat_template
    if config.file is not None:
        path = Path(config.file)
        if not path.is_file():
            raise ConfigError(f"{path}: no such template file. Check data's template.file.")
        source = path.read_text(encoding="utf-8")
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise ConfigError(
            f"{tokenizer.name_or_path}: this tokenizer has no chat template. "
            "Set data's template.file, or template.prefix and template.suffix."
        )
    return JinjaTemplate(source, config, tokenizer)


class JinjaTemplate:
    """A chat template in Jinja, as tokenizers carry it."""

    def __init__(self, source: str, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the source and find out which texts are special tokens."""
        self.source = source
        self.variables = config.variables
        self.train_empty_thinking = config.train_empty_thinking
        self.tokenizer = tokenizer
        special = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: list[Message], tools: list[Any], prompt: bool) -> str:
        """The text of a conversation; with `prompt`, with the header of the next response."""
        visible = [{key: message[key] for key in TEMPLATE_KEYS if key in message} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                visible,
                tools=tools or None,
                chat_template=self.source,
                add_generation_prompt=prompt,
                tokenize=False,
                **self.variables,
            )
        except (JinjaError, TypeError, KeyError) as error:
            raise TemplateError(f"the chat template refuses this conversation ({error})") from error
        return str(text)

    def turns(self, messages: list[Message], tools: list[Any], wanted: list[int]) -> tuple[str, dict[int, Turn]]:
        """The text of a finished conversation and the range of each wanted message in it."""
        text = self.render(messages, tools, prompt=False)
        ranges: dict[int, Turn] = {}
        earliest = 0
        for index in wanted:
            content = self._content_range(messages, tools, index, text)
            start = self._start(messages, tools, index, text, content)
            turn = self._finish(messages, tools, index, text, start, content)
            if not earliest <= turn.start <= turn.content_end <= turn.stop:
                raise TemplateError(
                    f"the chat template renders message {index} differently when others follow it, so its place "
                    "cannot be found; set template.prefix and template.suffix, or another template.file"
                )
            ranges[index] = turn
            earliest = turn.stop
        return text, ranges

    def _content_range(
        self, messages: list[Message], tools: list[Any], index: int, text: str
    ) -> tuple[int, int] | None:
        """Where a message's content stands in the text, or None if the template rewrites it."""
        content = messages[index]["content"]
        stripped = content.strip()
        for body in (content, stripped):
            marked = [*messages[:index], {**messages[index], "content": body + MARKER}, *messages[index + 1 :]]
            rendered = self.render(marked, tools, prompt=False)
            end = rendered.find(MARKER)
            if end < 0 or rendered.count(MARKER) != 1 or rendered[:end] + rendered[end + len(MARKER) :] != text:
                continue
            start = end - len(stripped if body is stripped else content.lstrip())
            if start >= 0 and text[start:end].strip() == stripped:
                return start, end
            # The end is certain, the beginning is not: the template moved a part of the content.
            return end, end
        return None

    def _start(
        self,
        messages: list[Message],
        tools: list[Any],
        index: int,
        text: str,
        content: tuple[int, int] | None,
    ) -> int:
        """Where the response begins: after all that a prompt for it already holds."""
        if messages[index]["role"] != "assistant":
            if content is None:
                raise TemplateError(f"the chat template rewrites message {index}, so its place cannot be found")
            return content[0]
        prompt = self.render(messages[:index], tools, prompt=True) if index else self._opening(messages, tools)
        start = _common_prefix(prompt, text)
        if not self.train_empty_thinking and (block := EMPTY_THINKING.match(text, start)):
            start = block.end()
        return start

    def _opening(self, messages: list[Message], tools: list[Any]) -> str:
        """The prompt before a conversation that the assistant opens; templates rarely render no message at all."""
        try:
            return self.render([], tools, prompt=True)
        except TemplateError:
            content = self._content_range(messages, tools, 0, self.render(messages, tools, prompt=False))
            if content is None:
                raise
            return self.render(messages, tools, prompt=False)[: content[0]]

    def _finish(
        self,
        messages: list[Message],
        tools: list[Any],
        index: int,
        text: str,
        start: int,
        content: tuple[int, int] | None,
    ) -> Turn:
        """Find the end of the content and of the end-of-turn text behind it."""
        boundary: int | None = len(text)
        if index + 1 < len(messages):
            try:
                so_far = self.render(messages[: index + 1], tools, prompt=False)
            except TemplateError:
                so_far = text + MARKER
            boundary = len(so_far) if text.startswith(so_far) else None
        if boundary is None and messages[index].get("tool_calls"):
            return self._finish_tool_call(messages, tools, index, text, start)
        if content is not None:
            end = max(content[1], start)
            closing = self.special.search(text, end, len(text) if boundary is None else boundary)
            if closing is not None and (boundary is not None or not text[end : closing.start()].strip()):
                return Turn(start, end, closing.end())
            return Turn(start, end, end if boundary is None else boundary)
        if boundary is None:
            raise TemplateError(f"the chat template rewrites message {index}, so its end cannot be found")
        # The content is not verbatim (a tool call): the turn ends with the last special token before white space.
        last = max(self.special.finditer(text, start, boundary), key=re.Match.end, default=None)
        if last is not None and not text[last.end() : boundary].strip():
            return Turn(start, last.start(), last.end())
        return Turn(start, boundary, boundary)

    def _finish_tool_call(self, messages: list[Message], tools: list[Any], index: int, text: str, start: int) -> Turn:
        """The range of a turn that ends in a tool call: up to the first special token behind its last call."""
        *calls, last = messages[index]["tool_calls"]
        marked_call = {**last, "function": {**last["function"], "name": last["function"]["name"] + MARKER}}
        marked = {**messages[index], "tool_calls": [*calls, marked_call]}
        rendered = self.render([*messages[:index], marked, *messages[index + 1 :]], tools, prompt=False)
        place = rendered.find(MARKER)
        closing = self.special.search(text, place) if rendered.replace(MARKER, "") == text and place >= 0 else None
        if closing is None:
            raise TemplateError(f"the chat template rewrites message {index}, so its end cannot be found")
        return Turn(start, closing.start(), closing.end())


def _common_prefix(first: str, second: str) -> int:
    """Number of characters that two texts share at their beginning."""
    if second.startswith(first):
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


class PrefixSuffixTemplate:
    """prefix.format(role=...) + content + suffix for each message, one after the other."""

    def __init__(self, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the prefix by rendering it once."""
        self.prefix = config.prefix or ""
        self.suffix = config.suffix or ""
        self.role_names = config.role_names
        self.eos = (tokenizer.eos_token or "") if config.append_eos else ""
        self.bos = tokenizer.bos_token or ""
        try:
            self.prefix.format(role="user")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"template.prefix {self.prefix!r}: only {{role}} may stand in braces ({error!r})."
            ) from error

    def as_jinja(self) -> str:
        """The same as a Jinja chat template, for what reads an exported model; of the usual four roles."""
        headers = ", ".join(f"{role!r}: {self._header(role)!a}" for role in get_args(Role))
        turns = "{% for message in messages %}{{ headers[message.role] + message.content + suffix }}{% endfor %}"
        return (
            f"{{% set headers = {{{headers}}} %}}{{% set suffix = {self.suffix!a} %}}"
            f"{{% set bos = {self.bos!a} %}}{{% set text %}}{turns}{{% endset %}}"
            "{{ text if text.startswith(bos) else bos + text }}"
            "{% if add_generation_prompt %}{{ headers['assistant'] }}{% endif %}"
        )

    def _header(self, role: str) -> str:
        names = {"assistant": self.role_names.get("bot", "assistant")} | self.role_names
        return self.prefix.format(role=names.get(role, role))

    def render(self, messages: list[Message], tools: list[Any], prompt: bool) -> str:
        """The text of a conversation; with `prompt`, with the header of the next response."""
        if tools:
            raise TemplateError("template.prefix and template.suffix have no place for tools; use a Jinja template")
        text = "".join(self._header(m["role"]) + m["content"] + self.suffix for m in messages)
        if self.bos and not text.startswith(self.bos):
            text = self.bos + text
        return text + self._header("assistant") if prompt else text

    def turns(self, messages: list[Message], tools: list[Any], wanted: list[int]) -> tuple[str, dict[int, Turn]]:
        """The text of a finished conversation and the range of each wanted message in it."""
        text = self.render(messages, tools, prompt=False)
        ranges = {}
        position = len(text) - len("".join(self._header(m["role"]) + m["content"] + self.suffix for m in messages))
        for index, message in enumerate(messages):
            start = position + len(self._header(message["role"]))
            content_end = start + len(message["content"])
            position = content_end + len(self.suffix)
            if index in wanted:
                ranges[index] = Turn(start, content_end, position)
        last = len(messages) - 1
        if self.eos and not text.rstrip().endswith(self.eos):
            text += self.eos
            if last in ranges:
                ranges[last] = Turn(ranges[last].start, ranges[last].content_end, len(text))
        return text, ranges
