"""Conversations with passages in them as token ids, for a generator that answers with what was retrieved."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.example import Dropped, Example, Prompt
from lit_alignment.data.encoding.messages import TEMPLATE_KEYS, Message, Record
from lit_alignment.data.encoding.spans import dropped
from lit_alignment.data.encoding.templates import JinjaTemplate
from lit_alignment.data.passages import Passage, check_format, format_passage
from lit_alignment.errors import ConfigError, TemplateError


@dataclass(frozen=True)
class PassagePlacementConfig:
    """How passages stand in a conversation.

    Args:
        place: Around the last user message (`user`), in the system message (`system`), or handed to a chat template
            that takes them (`documents`).
        block: How the passages stand beside the message that takes them, a text with {passages} and {message}. With
            the passages last, all sequences of a question begin alike, and that beginning is computed once.
        passage: How one passage is written, a text with {title} and {text}.
        separator: Between passages.
        max_tokens: Longest passage, in the generator's tokens; longer ones lose their end. So do passages for which
            `encoding.max_length` leaves no room.
    """

    place: Literal["user", "system", "documents"] = "user"
    block: str = "{passages}\n\n{message}"
    passage: str = "{title}\n{text}"
    separator: str = "\n\n"
    max_tokens: int = 256

    def __post_init__(self) -> None:
        """Refuse forms that lose something."""
        check_format("placement.passage", self.passage)
        if self.block.count("{passages}") != 1 or self.block.count("{message}") != 1:
            raise ConfigError(f"placement.block is {self.block!r}; give {{passages}} and {{message}} once each.")
        if self.max_tokens < 1:
            raise ConfigError(f"placement.max_tokens is {self.max_tokens}; use 1 or more.")


class RAGEncoder(Encoder):
    """Encodes conversations with passages in them, so that the last response is trained or asked for.

    Args:
        tokenizer: The generator's tokenizer.
        config: How conversations become examples; the last response alone is trained.
        seed: Seed of random cuts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, seed: int = 0) -> None:
        """Take the settings that RAG needs.

        Raises:
            ConfigError: If messages would be cut inside.
        """
        if config.truncation_unit != "messages":
            raise ConfigError("encoding.truncation_unit: RAG removes whole messages and cuts passages; use messages.")
        super().__init__(tokenizer, replace(config, loss_on="last_assistant"), seed)
        self.placement = PassagePlacementConfig()

    def without_end(self) -> "RAGEncoder":
        """The same for answers that a limit has cut: what would end their turn is not scored."""
        own = copy.copy(self)
        own.config = replace(self.config, end_of_turn="none")
        return own

    def split(self, record: Record, system_prompt: str | None = None) -> tuple[list[Message], Message]:
        """The messages up to the last response, shortened to `max_length` without passages, and that response.

        Nothing of what earlier messages say of the loss is kept: they are not trained.

        Raises:
            Dropped: If there is no response to train on, no question before it, or it is too long.
        """
        messages = self._prepared(record, system_prompt)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        if last < 0 or not messages[last].get("train", True) or messages[last].get("weight", 1.0) <= 0:
            raise Dropped("no_trained_message")
        answer = messages[last]
        asked: list[Message] = [untrained(message) for message in messages[:last]]
        if not any(message["role"] == "user" for message in asked):
            raise Dropped("no_question")
        try:
            _, kept = self._shorten_ids(
                record,
                [*asked, answer],
                lambda shorter: self._encode_messages(shorter, record.tools).input_ids,
                lambda message: message is answer,
            )
        except TemplateError as error:
            raise dropped(record, error, self.locator) from error
        if not any(message["role"] == "user" for message in kept):
            raise Dropped("too_long")
        return kept[:-1], answer

    def example(
        self, asked: list[Message], answer: Message, passages: Sequence[Passage], tools: Sequence[Any] = ()
    ) -> Example:
        """A training example with passages in the prompt.

        Args:
            asked: The messages up to the answer.
            answer: The trained message.
            passages: What was retrieved, best first; may be empty.
            tools: Tool descriptions for the template.
        """
        found: Example = self._fitted(
            asked, passages, lambda placed, own: own._encode_messages([*placed, answer], list(tools))
        )
        return found

    def prompt(self, asked: list[Message], passages: Sequence[Passage], tools: Sequence[Any] = ()) -> Prompt:
        """What to generate from, with passages in it."""
        found: Prompt = self._fitted(
            asked,
            passages,
            lambda placed, own: Prompt(
                own._prompt_ids(Record("", placed, "", tools=list(tools)), placed), placed, None
            ),
        )
        return found

    def _fitted(self, asked: list[Message], passages: Sequence[Passage], encode: Any) -> Any:
        """What `encode` makes of the messages with the passages, these cut until all fits into `max_length`."""
        limit = self.placement.max_tokens
        while True:
            encoded = encode(*self._placed(asked, passages, limit))
            excess = len(encoded.input_ids) - self.config.max_length
            if excess <= 0 or not passages or limit == 0:
                return encoded
            # Only passages that reach the limit become shorter, so one round may not do.
            limit = max(0, min(limit - 1, limit - -(-excess // len(passages))))

    def _placed(
        self, asked: list[Message], passages: Sequence[Passage], limit: int
    ) -> tuple[list[Message], "RAGEncoder"]:
        """Messages with the passages in them, and the encoder whose template knows of the others."""
        if not passages:
            return asked, self
        placement = self.placement
        texts = [(passage.title, self._cut(passage.text, limit)) for passage in passages]
        if placement.place == "documents":
            template = copy.copy(self.template)
            if not isinstance(template, JinjaTemplate):
                raise ConfigError("placement.place: documents needs a Jinja chat template; use user or system.")
            documents = [{"title": title, "text": text} for title, text in texts]
            template.variables = {**template.variables, "documents": documents}
            own = copy.copy(self)
            own.template, own.locator = template, copy.copy(self.locator)
            own.locator.template = template
            return asked, own
        written = placement.separator.join(format_passage(placement.passage, *each) for each in texts)
        messages = list(asked)
        if placement.place == "system" and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": "", "train": False})
        index = 0
        if placement.place == "user":
            index = max(i for i, message in enumerate(messages) if message["role"] == "user")
        # Not str.format: a message may hold braces.
        before, _, after = placement.block.partition("{passages}")
        content = messages[index]["content"]
        filled = before.replace("{message}", content) + written + after.replace("{message}", content)
        messages[index] = {**messages[index], "content": filled.strip() if not content else filled}
        return messages, self

    def _cut(self, text: str, limit: int) -> str:
        """The text up to its first tokens."""
        if len(text) <= limit:  # a token has at least one character
            return text
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= limit else text[: offsets[limit - 1][1]] if limit else ""


def untrained(message: Message) -> Message:
    """A message without what it says of the loss."""
    return {key: message[key] for key in TEMPLATE_KEYS if key in message} | {"train": False}
