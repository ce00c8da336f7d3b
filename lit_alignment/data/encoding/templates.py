"""From a conversation to its text, by a Jinja chat template or by a prefix and suffix around each message."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lit_alignment.data.encoding.marks import Template, sample_call
from lit_alignment.data.encoding.messages import TEMPLATE_KEYS, Message, Role
from lit_alignment.data.sources.values import encodable
from lit_alignment.errors import ConfigError, TemplateError

NoText = Literal["empty", "missing", "null"]  # how a template learns that no text stands beside a tool call
NO_TEXT: dict[str | None, tuple[NoText, ...]] = {  # of "" and null in a record: as transformers has it, or else
    "": ("empty", "missing", "null"),
    None: ("missing", "empty", "null"),
}
RESULT: list[Message] = [
    {"role": "tool", "name": "qwz", "tool_call_id": "call00000", "content": "b"},
    {"role": "assistant", "content": "c"},
]
LITERAL = re.compile(r"""(["'])(.*?)\1""", re.DOTALL)
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


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
        prompt_block: What becomes of a think block that stands in prompts alone, before answers without reasoning:
            `keep` prompts with it all the same, `drop` without it, `train` trains each answer behind it, closed.
        date: The day that templates write as today, such as "2026-01-31"; None for the day on which data are encoded.
        max_characters: Longest text that a Jinja template may write; a longer one is an error of the template.
    """

    file: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    prefix: str | None = None
    suffix: str | None = None
    role_names: dict[str, str] = field(default_factory=dict)
    append_eos: bool = True
    train_empty_thinking: bool = False
    prompt_block: Literal["keep", "drop", "train"] = "keep"
    date: str | None = None
    max_characters: int = 20_000_000

    def __post_init__(self) -> None:
        """Refuse a mixture of the two forms."""
        if (self.prefix is None) != (self.suffix is None):
            raise ConfigError("template: give 'prefix' and 'suffix' together.")
        if self.prefix is not None and self.file is not None:
            raise ConfigError("template: give 'file' or 'prefix' and 'suffix', not both.")
        if self.max_characters < 1:
            raise ConfigError(f"template.max_characters is {self.max_characters}; use 1 or more.")
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError as error:
                raise ConfigError(f"template.date is {self.date!r}; write it as 2026-01-31.") from error


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
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}). Save the template as UTF-8 text.") from error
    if not source:
        raise ConfigError(
            f"{tokenizer.name_or_path}: this tokenizer has no chat template. "
            "Set data's template.file, or template.prefix and template.suffix."
        )
    return JinjaTemplate(source, config, tokenizer)


class JinjaTemplate:
    """A chat template in Jinja, as tokenizers carry it; of several by name, `tool_use` is for tools."""

    ending = ""

    def __init__(
        self, source: str | dict[str, str], config: TemplateConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Keep the source, and find out which forms of a tool call it takes."""
        self.sources = source if isinstance(source, dict) else {"default": source}
        self.writes_today = config.date is None and any(TODAY.search(each) for each in self.sources.values())
        if config.date is not None:
            today = date.fromisoformat(config.date)
            self.sources = {
                name: TODAY.sub(lambda call: json.dumps(today.strftime(call[2])), each)
                for name, each in self.sources.items()
            }
        literals = {text for each in self.sources.values() for _, text in LITERAL.findall(each)}
        tags = sorted(tag for text in literals if re.search(r"[<\[|#/]", tag := text.replace("\\n", "\n").strip()))
        self.looks_at = re.compile("|".join(map(re.escape, tags)) or r"(?!)")
        self.variables, self.max_characters = config.variables, config.max_characters
        self.name = config.file or f"of {tokenizer.name_or_path}"
        self.special_tokens = dict(tokenizer.special_tokens_map)
        self.text_as_parts, self.arguments_as_text = False, False
        self.text_as_parts = not self._shows_text() and self._shows_text(as_parts=True)
        self.no_text: dict[str | None, NoText] = {}
        for self.arguments_as_text in (False, True):
            takes = [form for form in NO_TEXT[""] if self._shows_call(form)]
            if takes := [form for form in takes if self._shows_call(form, answered=True)] or takes:
                self.no_text = {given: next(f for f in forms if f in takes) for given, forms in NO_TEXT.items()}
                break
        else:
            self.arguments_as_text, self.no_text = False, {"": "empty", None: "empty"}

    def source(self, tools: list[Any]) -> str:
        """The template for a conversation with these tools."""
        return self.sources["tool_use"] if tools and "tool_use" in self.sources else self.sources["default"]

    def render(self, messages: list[Message], tools: list[Any], prompt: bool) -> str:
        """The text of a conversation; with `prompt`, with the header of the next response.

        Raises:
            TemplateError: If the template refuses it.
        """
        source = self.source(tools)
        try:
            # What Jinja joins the pieces of a text with, here and in blocks; templates are compiled once.
            _compile_jinja_template(source).environment.concat = partial(_joined, most=self.max_characters)
            (text,), _ = render_jinja_template(
                conversations=[[self._visible(message) for message in messages]],
                tools=tools or None,
                chat_template=source,
                add_generation_prompt=prompt,
                **{**self.special_tokens, **self.variables},
            )
            return encodable(text)
        except Exception as error:  # a template is a program, and fails in any way that programs do
            raise TemplateError(f"the chat template {self.name} refuses this conversation ({error})") from error

    def reads(self, variable: str) -> bool:
        """Whether the name of a variable stands in the template."""
        return any(variable in source for source in self.sources.values())

    def remarks(self) -> list[str]:
        """That data would differ from day to day."""
        pin = "the chat template writes today's date: pin it by encoding.template.date."
        return [pin] if self.writes_today else []

    def _visible(self, message: Message) -> Message:
        """What the template sees of a message, in the form that it takes."""
        visible = {key: message[key] for key in TEMPLATE_KEYS if key in message}
        if visible["content"] is None or ("tool_calls" in visible and not visible["content"]):
            match self.no_text[visible["content"]]:
                case "empty":
                    visible["content"] = ""
                case "missing":
                    del visible["content"]
                case "null":
                    visible["content"] = None
        if self.text_as_parts and isinstance(visible.get("content"), str):
            visible["content"] = [{"type": "text", "text": visible["content"]}]
        if self.arguments_as_text and "tool_calls" in visible:
            visible["tool_calls"] = [_with_text(call) for call in visible["tool_calls"]]
        return visible

    def _shows_text(self, as_parts: bool = False) -> bool:
        """Whether the template renders a text, given as such or as a list of parts."""
        before, self.text_as_parts = self.text_as_parts, as_parts
        try:
            return "qwz" in self.render([{"role": "user", "content": "qwz"}], [], True)
        except TemplateError:
            return False
        finally:
            self.text_as_parts = before

    def _shows_call(self, no_text: NoText, answered: bool = False) -> bool:
        """Whether the template renders a tool call beside which no text stands in this form, or one with its result."""
        self.no_text = {"": no_text, None: no_text}
        answer: Message = {"role": "assistant", "content": "", "tool_calls": [sample_call("qwz")]}
        try:
            text = self.render([{"role": "user", "content": "a"}, answer, *(RESULT if answered else [])], [], False)
        except TemplateError:
            return False
        return "qwz" in text and "None" not in text


def _joined(pieces: Iterable[str], most: int) -> str:
    """The text of a template, of which no more is kept than the limit."""
    pieces, text, length = iter(pieces), [], 0
    while block := "".join(islice(pieces, 1000)):
        length += len(block)
        if length > most:
            raise TemplateError(f"it writes more than {most} characters; encoding.template.max_characters is the limit")
        text.append(block)
    return "".join(text)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


class PrefixSuffixTemplate:
    """prefix.format(role=...) + content + suffix for each message, one after the other."""

    def __init__(self, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the prefix by rendering it once."""
        self.prefix = config.prefix or ""
        self.suffix = config.suffix or ""
        self.looks_at = re.compile(r"(?!)")
        self.role_names = config.role_names
        self.ending = (tokenizer.eos_token or "") if config.append_eos else ""
        self.bos = tokenizer.bos_token or ""
        try:
            self.prefix.format(role="user")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"template.prefix {self.prefix!r}: only {{role}} may stand in braces ({error!r})."
            ) from error

    def reads(self, variable: str) -> bool:
        """It has none."""
        return False

    def remarks(self) -> list[str]:
        """There are none."""
        return []

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
        text = "".join(self._header(m["role"]) + (m["content"] or "") + self.suffix for m in messages)
        if self.bos and not text.startswith(self.bos):
            text = self.bos + text
        return text + self._header("assistant") if prompt else text
