"""The one encoder: from a conversation to token ids, labels and weights, for training and for prompts alike."""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lit_alignment.data.encoding.control import control_tokens, without_control_tokens
from lit_alignment.data.encoding.example import (
    CONTROL_TOKENS,
    SPLIT,
    STOP_ADDED,
    UNCLOSED,
    Dropped,
    Example,
    Prompt,
)
from lit_alignment.data.encoding.marks import sample_call
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Message, Record
from lit_alignment.data.encoding.probes import THINKING
from lit_alignment.data.encoding.shapes import Rendered, Turn
from lit_alignment.data.encoding.spans import TOOL, Locator, dropped
from lit_alignment.data.encoding.templates import TemplateConfig, build_template
from lit_alignment.data.encoding.tokenizer import TextTokenizer
from lit_alignment.data.encoding.truncation import Policy, Unit, shorten_messages, shorten_tokens
from lit_alignment.errors import ConfigError, RecordError, TemplateError

LossOn = Literal["all", "assistant", "last_assistant"]
EndOfTurn = Literal["turn", "last", "none"]


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
        control_tokens: What becomes of special tokens in the texts of messages: `keep` reads them as control tokens,
            `escape` as text, with a zero-width space in each, `error` ends the run.
        continue_final_message: A prompt may end with the beginning of a response, which the model goes on from.
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
    control_tokens: Literal["keep", "escape", "error"] = "keep"
    continue_final_message: bool = False


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
            prompt_block=config.template.prompt_block,
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
        messages = self._prepared(record, system_prompt)
        wanted = self._trained(messages)
        if not wanted:
            raise Dropped("no_trained_message")
        try:
            example = self._encode_messages(messages, record.tools)
            if len(example.input_ids) > self.config.max_length:
                example = self._shorten(record, messages, example)
        except TemplateError as error:
            raise dropped(record, error, self.locator) from error
        if example.num_trained == 0:
            raise Dropped("no_trained_token")
        return example

    def encode_prompt(self, record: Record, system_prompt: str | None = None) -> Prompt:
        """The ids to generate from: the conversation without its last response, or cut before a random one.

        Raises:
            Dropped: With the reason, if nothing is left to answer, or it is too long and the policy says so.
            RecordError: If it is too long and the policy says `error`.
        """
        messages = self._prepared(record, system_prompt)
        responses = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        cut = len(messages)
        if self.config.random_cut and responses:
            digest = hashlib.sha256(f"{self.seed}/{record.id}/random_cut".encode()).digest()
            cut = random.Random(digest).choice(responses)
        elif messages and messages[-1]["role"] == "assistant" and not self.config.continue_final_message:
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
            raise dropped(record, error, self.locator) from error
        return Prompt(ids, messages, reference)

    def encode_conversation(self, record: Record, system_prompt: str | None = None) -> Prompt:
        """The ids of a whole conversation, whoever speaks last: what a classifier reads.

        Raises:
            Dropped: With the reason, if it is too long and the policy says so.
            RecordError: If it is too long and the policy says `error`.
        """
        messages = self._prepared(record, system_prompt)

        def encode(shorter: list[Message]) -> list[int]:
            untrained = [{**message, "train": False} for message in shorter]
            return self._encode_messages(untrained, record.tools).input_ids

        try:
            ids, messages = self._shorten_ids(record, messages, encode, lambda message: True)
        except TemplateError as error:
            raise dropped(record, error, self.locator) from error
        return Prompt(ids, messages, None)

    def end_of_turn(self) -> list[int]:
        """Ids of the text that closes a response, found on a short conversation."""
        messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return self._encode_messages(messages, []).end_of_turn

    def end_of_call(self) -> list[int]:
        """Ids of the text that closes a response with a tool call; none if the template has no place for calls."""
        answer: Message = {"role": "assistant", "content": None, "tool_calls": [sample_call("f")]}
        for tools in ([TOOL], []):  # of several templates by name, one is for tools
            try:
                return self._encode_messages([{"role": "user", "content": "a"}, answer], tools).end_of_turn
            except TemplateError:
                continue
        return []

    def last_ids(self) -> set[int]:
        """Ids with which a short conversation ends, after a question and after an answer."""
        messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return {self._encode_messages(messages[:number], []).input_ids[-1] for number in (1, 2)}

    @property
    def placeholders(self) -> set[str]:
        """Special tokens that belong into texts."""
        return set()

    def _prepared(self, record: Record, system_prompt: str | None) -> list[Message]:
        """The messages of a record as they are rendered: with the system prompt, and control tokens as asked for."""
        messages = record.messages
        if (self.config.ignore_system_prompt or system_prompt is not None) and messages[0]["role"] == "system":
            messages = messages[1:]
        if system_prompt is not None:
            messages = [{"role": "system", "content": system_prompt, "train": False}, *messages]
        handling = self.config.control_tokens
        if handling != "keep" and (found := control_tokens(messages, self.special, self.placeholders)):
            return without_control_tokens(messages, found, handling, record.where)
        return messages

    def _trained(self, messages: list[Message]) -> list[int]:
        """Indices of the trained messages."""
        responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        by_role = {"all": range(len(messages)), "assistant": responses, "last_assistant": responses[-1:]}
        chosen = set(by_role[self.config.loss_on])
        # `train: false` takes a message out; `train: true` brings in one that its role leaves out.
        return [
            index
            for index, message in enumerate(messages)
            if message.get("train", index in chosen) and message.get("weight", 1.0) > 0
        ]

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
            first, last = tokens.begin(turn.boundary), tokens.end(stop)
            start = self._behind_reasoning(rendered, turn, index == trained[-1])
            while first < last and tokens.place(first)[1] <= start:
                first += 1  # white space before the start may be a part of the first token
            labels[first:last] = tokens.ids[first:last]
            weights[first:last] = [messages[index].get("weight", 1.0)] * (last - first)
        example = Example(tokens.ids, labels, weights)
        closing = next((t for i, t in reversed(turns.items()) if messages[i]["role"] == "assistant"), None)
        if closing is not None:
            example.end_of_turn = tokens.ids[tokens.begin(closing.content_end) : tokens.end(closing.stop)]
        example.notes = {SPLIT: tokens.splits, STOP_ADDED: int(rendered.added != "")}
        example.notes[CONTROL_TOKENS] = len(control_tokens(messages, self.special, self.placeholders))
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
            pinned = self._pinned(example.input_ids, messages, record)
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
        begun = messages[-1]["role"] == "assistant"
        text, boundaries = (
            self.locator.begun(messages, record.tools) if begun else self.locator.starts(messages, record.tools)
        )
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
            kept = shorten_tokens(len(ids), policy, self.config.max_length, self._pinned(ids, messages, record))
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

    def _pinned(self, ids: list[int], messages: list[Message], record: Record) -> int:
        """Number of tokens that token truncation keeps: BOS, and the system message."""
        first = self.tokenizer.bos_token_id
        bos = int(first is not None and ids[:1] == [first] and ids.count(first) == 1)  # no header that begins turns
        if messages[0]["role"] != "system":
            return bos
        try:
            text = self.template.render(messages[:1], record.tools, prompt=False)
        except TemplateError:
            return bos  # a template that cannot render a system message alone has it inside the user's
        return max(bos, len(self.tokenize(text, []).ids))
