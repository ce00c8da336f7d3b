"""Several responses to one prompt, and responses made of steps, as token ids."""

from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from lit_alignment.data.encoding.encoder import Encoder
from lit_alignment.data.encoding.example import Dropped, Example
from lit_alignment.data.encoding.messages import Message, Record
from lit_alignment.data.encoding.spans import dropped
from lit_alignment.data.encoding.truncation import shorten_messages
from lit_alignment.errors import ConfigError, TemplateError

Encoded = TypeVar("Encoded")


class ResponseEncoder(Encoder):
    """Encodes prompts with their responses."""

    def encode_responses(
        self,
        record: Record,
        responses: list[list[Message]],
        system_prompt: str | None = None,
        allow_empty: bool = False,
    ) -> list[Example]:
        """Examples of several responses to one prompt, which begin with the same prompt ids and train their response.

        The prompt is shortened once, by whole messages, so that the longest response fits behind it. Under
        `keep_start` a record that is too long is dropped: without its last message the prompt would be another
        question.

        Args:
            record: The conversation up to the responses.
            responses: What could follow; of several messages the assistant's are trained.
            system_prompt: Replaces the system message.
            allow_empty: Also take a response without text, which can be scored, though nothing is learned from it.

        Raises:
            Dropped: With the reason, if a response is empty or nothing of the prompt would be left.
            RecordError: If it is too long and the policy says `error`.
        """
        own = [message for response in responses for message in response if message["role"] == "assistant"]
        if not allow_empty and not all((m["content"] or "").strip() or m.get("tool_calls") for m in own):
            raise Dropped("empty_response")
        trained: list[list[Message]] = [
            [{**message, "train": message["role"] == "assistant"} for message in response] for response in responses
        ]

        def encode(prompt: list[Message]) -> list[Example]:
            return [self._encode_messages([*prompt, *response], record.tools) for response in trained]

        def longest(examples: list[Example]) -> int:
            return max(len(example.input_ids) for example in examples)

        examples = self._behind_prompt(record, system_prompt, encode, longest)
        if not allow_empty and any(example.num_trained == 0 for example in examples):
            raise Dropped("no_trained_token")
        return examples

    def encode_steps(
        self, record: Record, steps: list[str], separator: str, system_prompt: str | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids of a response made of steps, and the positions where each step's separator ends.

        Args:
            record: The conversation up to the response.
            steps: Texts of the steps.
            separator: What closes each step, the last one too.
            system_prompt: Replaces the system message.

        Raises:
            Dropped: With the reason, if a step is empty or nothing of the prompt would be left.
            ConfigError: If the template changes the response, so that its separators cannot be found.
            RecordError: If it is too long and the policy says `error`.
        """
        if not steps or not all(step.strip() for step in steps):
            raise Dropped("empty_response")
        content = "".join(step + separator for step in steps)
        response: Message = {"role": "assistant", "content": content, "train": True}
        ends = list(accumulate(len(step) + len(separator) for step in steps))

        def encode(prompt: list[Message]) -> tuple[list[int], list[int]]:
            rendered = self.locator.locate_last([*prompt, response], record.tools)
            text, turn = rendered.text, rendered.turns[len(prompt)]
            start = text.find(content, turn.boundary)
            if start < 0:
                raise ConfigError(
                    f"data.step_separator {separator!r}: the template changes it at the end of a response. "
                    "Use one that is not white space, such as a token of model.tokens.new."
                )
            stops = [start + end for end in ends]
            tokens = self.tokenize(text, [start, *stops])
            return tokens.ids, [tokens.begin(stop) - 1 for stop in stops]

        return self._behind_prompt(record, system_prompt, encode, lambda found: len(found[0]))

    def _behind_prompt(
        self,
        record: Record,
        system_prompt: str | None,
        encode: Callable[[list[Message]], Encoded],
        length: Callable[[Encoded], int],
    ) -> Encoded:
        """What `encode` makes of the prompt, or of the longest end of it behind which the responses fit."""
        prompt = [{**message, "train": False} for message in self._prepared(record, system_prompt)]
        try:
            encoded = encode(prompt)
            if length(encoded) > self.config.max_length:
                shorter = shorten_messages(
                    prompt,
                    self._policy(record, length(encoded)),
                    fits=lambda candidate: length(encode(candidate)) <= self.config.max_length,
                    ends=lambda message: message is prompt[-1],
                )
                if shorter is None:
                    raise Dropped("too_long")
                encoded = encode(shorter)
        except TemplateError as error:
            raise dropped(record, error, self.locator) from error
        return encoded
