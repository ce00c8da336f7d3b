"""The one encoder: from a conversation to token ids, labels and weights, for training and for prompts alike."""

import hashlib
import random
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lit_alignment.data.encoding.messages import IGNORE_INDEX, Message, Record
from lit_alignment.data.encoding.spans import THINKING, HistoryDiffers, Locator, NotRendered, Rendered, Turn
from lit_alignment.data.encoding.templates import TemplateConfig, build_template
from lit_alignment.data.encoding.tokenizer import TextTokenizer
from lit_alignment.data.encoding.truncation import Policy, Unit, shorten_messages, shorten_tokens
from lit_alignment.errors import ConfigError, RecordError, TemplateError

LossOn = Literal["all", "assistant", "last_assistant"]
EndOfTurn = Literal["turn", "last", "none"]


@dataclass
class Example:
    """One encoded conversation.

    Args:
        input_ids: Token ids, [T].
        labels: The same ids where the loss applies, else IGNORE_INDEX, [T]; aligned with `input_ids`.
        weights: Weight of each label in the loss, [T].
        end_of_turn: Ids of the text that closes a response.
        media: Files that placeholders among the ids stand for, by modality.
        notes: How often something happened that is worth a line in the report.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    end_of_turn: list[int] = field(default_factory=list)
    media: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def num_trained(self) -> int:
        """Labels that count: the first token has no prediction, so its label never does."""
        return sum(label != IGNORE_INDEX and w > 0 for label, w in zip(self.labels[1:], self.weights[1:], strict=True))


@dataclass
class Prompt:
    """What a model is asked: ids up to where its response begins.

    Args:
        input_ids: Token ids, [T].
        messages: The messages behind them.
        reference: The response that the record has at this position, if any.
        media: Files that placeholders among the ids stand for, by modality.
    """

    input_ids: list[int]
    messages: list[Message]
    reference: str | None
    media: dict[str, list[str]] = field(default_factory=dict)


HISTORY_DIFFERS = "history_differs"
# What an example's notes count.
SPLIT, STOP_ADDED, UNCLOSED = "tokens split where a prompt ends", "end of turn added", "turns without an end"


class Dropped(Exception):
    """A record that does not become an example, with the reason that the drop report counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class EncodingConfig:
    """How conversations become examples.

    Args:
        template: How a conversation becomes text.
        max_length: Longest example, in tokens.
        truncation: What becomes of longer conversations.
        truncation_unit: Whether whole messages or single tokens are removed.
        loss_on: Which messages are trained; a message's own `train` field goes first.
        end_of_turn: Whether the end-of-turn text is trained on each trained message, the last, or none.
        ignore_system_prompt: Leave out the conversation's own system message.
        random_cut: For prompts, cut each conversation before a random response, seeded by the record's id.
        add_stop: Add what ends a turn behind the last response where the template writes it with the next message.
        split_turns: What becomes of a conversation whose template renders what stands before a response otherwise than
            the model would see it: `auto` makes one example of each trained response, `never` drops the record.
        reasoning: Which reasoning is trained: what the template renders, that of the last response only, or none.
    """

    template: TemplateConfig = field(default_factory=TemplateConfig)
    max_length: int = 2048
    truncation: Policy = "keep_end"
    truncation_unit: Unit = "messages"
    loss_on: LossOn = "assistant"
    end_of_turn: EndOfTurn = "turn"
    ignore_system_prompt: bool = False
    random_cut: bool = False
    add_stop: bool = True
    split_turns: Literal["auto", "never"] = "auto"
    reasoning: Literal["as_rendered", "last_only", "none"] = "as_rendered"


class Encoder:
    """Encodes conversations with one tokenizer and one configuration."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, seed: int = 0) -> None:
        """Build the template.

        Raises:
            ConfigError: If the tokenizer cannot give character offsets or has no template.
        """
        if not tokenizer.is_fast:
            raise ConfigError(f"{tokenizer.name_or_path}: a fast tokenizer is needed (one with tokenizer.json).")
        if config.max_length < 2:
            raise ConfigError(f"data.encoding.max_length is {config.max_length}; use 2 or more.")
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed
        self.template = build_template(config.template, tokenizer)
        self.tokenize = TextTokenizer(tokenizer)
        special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(filter(None, special | set(tokenizer.all_special_tokens)), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.locator = Locator(
            self.template,
            self.special,
            tokenizer.eos_token or "",
            tokenizer.bos_token or "",
            train_empty_thinking=config.template.train_empty_thinking,
            add_stop=config.add_stop,
        )

    def split_turns(self, record: Record) -> list[Record]:
        """A record for each trained response, which alone is trained in it and ends it; none if that is not wanted."""
        if self.config.split_turns == "never":
            return []
        responses = [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]
        parts = []
        for last in self._trained(record.messages):
            messages = [{**message, "train": i == last} for i, message in enumerate(record.messages[: last + 1])]
            turn = responses.index(last) + 1 if last in responses else last
            parts.append(replace(record, id=f"{record.id}#{turn}", messages=messages))
        return parts

    def encode(self, record: Record, system_prompt: str | None = None) -> Example:
        """The training example of a record.

        Args:
            record: The conversation.
            system_prompt: Replaces its system message.

        Raises:
            Dropped: With the reason, if it does not become an example.
            RecordError: If it is too long and the policy says `error`.
        """
        messages = self._with_system_prompt(record.messages, system_prompt)
        wanted = self._trained(messages)
        if not wanted:
            raise Dropped("no_trained_message")
        try:
            example = self._encode_messages(messages, record.tools)
            if len(example.input_ids) > self.config.max_length:
                example = self._shorten(record, messages, example)
        except TemplateError as error:
            raise dropped(record, error) from error
        if example.num_trained == 0:
            raise Dropped("no_trained_token")
        return example

    def encode_prompt(self, record: Record, system_prompt: str | None = None) -> Prompt:
        """The ids to generate from: the conversation without its last response, or cut before a random one.

        Raises:
            Dropped: With the reason, if nothing is left to answer, or it is too long and the policy says so.
            RecordError: If it is too long and the policy says `error`.
        """
        messages = self._with_system_prompt(record.messages, system_prompt)
        responses = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        cut = len(messages)
        if self.config.random_cut and responses:
            digest = hashlib.sha256(f"{self.seed}/{record.id}/random_cut".encode()).digest()
            cut = random.Random(digest).choice(responses)
        elif messages and messages[-1]["role"] == "assistant":
            cut -= 1
        reference = messages[cut]["content"] if cut < len(messages) else None
        messages = messages[:cut]
        if not any(message["role"] != "system" for message in messages):
            raise Dropped("nothing_to_answer")
        try:
            ids, messages = self._shorten_ids(
                record,
                messages,
                lambda shorter: self._prompt_ids(record, shorter),
                lambda message: message["role"] != "assistant",
            )
        except TemplateError as error:
            raise dropped(record, error) from error
        return Prompt(ids, messages, reference)

    def encode_conversation(self, record: Record, system_prompt: str | None = None) -> Prompt:
        """The ids of a whole conversation, whoever speaks last: what a classifier reads.

        Raises:
            Dropped: With the reason, if it is too long and the policy says so.
            RecordError: If it is too long and the policy says `error`.
        """
        messages = self._with_system_prompt(record.messages, system_prompt)

        def encode(shorter: list[Message]) -> list[int]:
            return self._encode_messages(shorter, record.tools).input_ids

        try:
            ids, messages = self._shorten_ids(record, messages, encode, lambda message: True)
        except TemplateError as error:
            raise dropped(record, error) from error
        return Prompt(ids, messages, None)

    def end_of_turn(self) -> list[int]:
        """Ids of the text that closes a response, found on a short conversation."""
        messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return self._encode_messages(messages, []).end_of_turn

    def last_ids(self) -> set[int]:
        """Ids with which a short conversation ends, after a question and after an answer."""
        messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return {self._encode_messages(messages[:number], []).input_ids[-1] for number in (1, 2)}

    def _with_system_prompt(self, messages: list[Message], system_prompt: str | None) -> list[Message]:
        if (self.config.ignore_system_prompt or system_prompt is not None) and messages[0]["role"] == "system":
            messages = messages[1:]
        if system_prompt is not None:
            messages = [{"role": "system", "content": system_prompt, "train": False}, *messages]
        return messages

    def _trained(self, messages: list[Message]) -> list[int]:
        """Indices of the trained messages."""
        trained = []
        last_response = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        for index, message in enumerate(messages):
            match self.config.loss_on:
                case "all":
                    by_role = True
                case "assistant":
                    by_role = message["role"] == "assistant"
                case "last_assistant":
                    by_role = index == last_response
            # `train: false` takes a message out; `train: true` brings in one that its role leaves out.
            if message.get("train", by_role) and message.get("weight", 1.0) > 0:
                trained.append(index)
        return trained

    def _encode_messages(self, messages: list[Message], tools: list[Any]) -> Example:
        trained = self._trained(messages)
        rendered = self._rendered(messages, tools, trained)
        turns = rendered.turns
        tokens = self.tokenize(rendered.text, [turn.boundary for turn in turns.values()])
        labels = [IGNORE_INDEX] * len(tokens.ids)
        weights = [0.0] * len(tokens.ids)
        for index in trained:
            turn = turns[index]
            stop = turn.stop
            if self.config.end_of_turn == "none" or (self.config.end_of_turn == "last" and index != trained[-1]):
                stop = turn.content_end
            start = self._behind_reasoning(rendered, turn, index == trained[-1])
            for position in range(bisect_left(tokens.starts, turn.boundary), len(tokens.ids)):
                begin, end = tokens.starts[position], tokens.ends[position]
                if end > stop:
                    break
                if begin < end and end > start:  # white space before the start may be a part of the first token
                    labels[position] = tokens.ids[position]
                    weights[position] = messages[index].get("weight", 1.0)
        example = Example(tokens.ids, labels, weights)
        closing = next((t for i, t in reversed(turns.items()) if messages[i]["role"] == "assistant"), None)
        if closing is not None:
            behind = range(bisect_left(tokens.starts, closing.content_end), len(tokens.ids))
            example.end_of_turn = [tokens.ids[i] for i in behind if tokens.starts[i] < tokens.ends[i] <= closing.stop]
        example.notes = {SPLIT: tokens.splits, STOP_ADDED: int(rendered.added != "")}
        example.notes[UNCLOSED] = sum(not turns[index].closed for index in trained)
        return example

    def _rendered(self, messages: list[Message], tools: list[Any], trained: list[int]) -> Rendered:
        """The text, and where its messages stand; a last response stands behind its prompt as predict renders it."""
        if trained == [len(messages) - 1]:
            return self.locator.locate_last(messages, tools)
        return self.locator.locate(messages, tools, trained)

    def _behind_reasoning(self, rendered: Rendered, turn: Turn, is_last: bool) -> int:
        """Where the trained part of a turn begins if its reasoning is not trained."""
        if self.config.reasoning == "as_rendered" or (self.config.reasoning == "last_only" and is_last):
            return turn.start
        block = THINKING.match(rendered.text, turn.start, turn.content_end)
        return turn.start if block is None else block.end()

    def _shorten(self, record: Record, messages: list[Message], example: Example) -> Example:
        policy = self._policy(record, len(example.input_ids))
        if self.config.truncation_unit == "tokens":
            pinned = self._pinned(messages, record)
            kept = shorten_tokens(len(example.input_ids), policy, self.config.max_length, pinned)
            positions = [position for begin, end in kept for position in range(begin, end)]
            return replace(
                example,
                input_ids=[example.input_ids[position] for position in positions],
                labels=[example.labels[position] for position in positions],
                weights=[example.weights[position] for position in positions],
            )

        def encode(shorter: list[Message]) -> Example:
            return self._encode_messages(shorter, record.tools)

        trained = {id(messages[index]) for index in self._trained(messages)}
        shorter = shorten_messages(
            messages,
            policy,
            fits=lambda candidate: len(encode(candidate).input_ids) <= self.config.max_length,
            ends=lambda message: id(message) in trained,
        )
        if shorter is None or not self._trained(shorter):
            raise Dropped("too_long")
        return encode(shorter)

    def _prompt_ids(self, record: Record, messages: list[Message]) -> list[int]:
        # Earlier responses are split from their prompts exactly as in training.
        text, boundaries = self.locator.starts(messages, record.tools)
        return self.tokenize(text, boundaries).ids

    def _shorten_ids(
        self,
        record: Record,
        messages: list[Message],
        encode: Callable[[list[Message]], list[int]],
        ends: Callable[[Message], bool],
    ) -> tuple[list[int], list[Message]]:
        """Ids of a conversation without labels, shortened if need be, and the messages behind them."""
        ids = encode(messages)
        if len(ids) <= self.config.max_length:
            return ids, messages
        policy = self._policy(record, len(ids))
        if self.config.truncation_unit == "tokens":
            kept = shorten_tokens(len(ids), policy, self.config.max_length, self._pinned(messages, record))
            return [ids[i] for a, b in kept for i in range(a, b)], messages
        shorter = shorten_messages(
            messages,
            policy,
            fits=lambda candidate: len(encode(candidate)) <= self.config.max_length,
            ends=ends,
        )
        if shorter is None:
            raise Dropped("too_long")
        return encode(shorter), shorter

    def _policy(self, record: Record, length: int) -> Literal["keep_start", "keep_end", "middle"]:
        if self.config.truncation == "drop":
            raise Dropped("too_long")
        if self.config.truncation == "error":
            raise RecordError(
                record.where,
                "",
                f"the conversation has {length} tokens, more than max_length {self.config.max_length}",
                "Raise data's encoding.max_length, or set encoding.truncation to drop, keep_start, keep_end or middle.",
            )
        return self.config.truncation

    def _pinned(self, messages: list[Message], record: Record) -> int:
        """Number of tokens of the system message, which token truncation keeps."""
        if messages[0]["role"] != "system":
            return 0
        try:
            text = self.template.render(messages[:1], record.tools, prompt=False)
        except TemplateError:
            return 0  # a template that cannot render a system message alone has it inside the user's
        return len(self.tokenize(text, []).ids)


def dropped(record: Record, error: TemplateError) -> Dropped:
    """The reason for which a record that its template cannot render as it should is dropped."""
    match error:
        case HistoryDiffers():
            reason = HISTORY_DIFFERS
        case NotRendered():
            reason = "not_rendered"
        case _:
            reason = "template_error"
    return Dropped(reason, f"{record.where}: {error}")
