"""What a reward function is, and what it reads of a record."""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lit_alignment.data.encoding.messages import Message, read_record
from lit_alignment.errors import ConfigError

ScoreList = list[float | None]
Given = ScoreList | Coroutine[Any, Any, ScoreList]


@dataclass(kw_only=True, eq=False)
class RewardFunction(ABC):
    """Scores the responses to one prompt; a configuration names it by `class_path`.

    A function of one's own derives from this, as a dataclass or with a constructor that calls `super().__init__`.

    Args:
        weight: Of its scores in the reward; with 0 they are logged and change nothing.
        name: In logs and messages; that of the class, or of what it calls, by default.
        timeout: Seconds that the scores of one prompt may take; None waits. Only Python code can be given up: a library
            that holds the interpreter's lock holds the run, too.

    Attributes:
        inline: Whether it runs in the calling thread, as what is quick or computes on the model's device does; others
            run beside each other in threads, and have to bear it.

    Raises:
        ConfigError: If a setting is not usable, or has no effect.
    """

    inline: ClassVar[bool] = False
    weight: float = 1.0
    name: str = ""
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        self.name = self.name or self.default_name()
        if not math.isfinite(self.weight):
            raise self.refusal(f"weight is {self.weight}; use a finite number")
        if self.timeout is not None and self.inline:
            raise self.refusal("timeout has no effect, since it runs inline. Remove timeout")
        if self.timeout is not None and not self.timeout > 0:
            raise self.refusal(f"timeout is {self.timeout}; use more than 0 seconds, or null")

    @abstractmethod
    def __call__(self, responses: list[str], record: dict[str, Any]) -> Given:
        """The score of each response, higher is better; None for one that is not scored. It may be `async`.

        Args:
            responses: Texts of all responses to the record's prompt.
            record: The record as its file has it, with all of its fields.
        """

    def start(self, device: torch.device) -> None:  # noqa: B027 - a hook
        """Load what scoring needs, before the first rollout.

        Args:
            device: That of the policy.
        """

    def close(self) -> None:  # noqa: B027 - a hook
        """Let go of it, after the last one."""

    def default_name(self) -> str:
        """The class's name in lower case, without `Reward`: `exact_match` of ExactMatchReward."""
        words = type(self).__name__
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words.removesuffix("Reward") or words).lower()

    def refusal(self, problem: str) -> ConfigError:
        """The error of a setting.

        Args:
            problem: What is wrong and what to do, without a full stop.
        """
        return ConfigError(f"model.rewards.{self.name}: {problem}.")


@dataclass(kw_only=True, eq=False)
class ReferenceReward(RewardFunction):
    """Compares the responses with what the record says is right.

    Args:
        field: Where that stands in the record; a dot goes into an object, as in `meta.answer`. By default it is the
            record's last message, if that is the assistant's, or else `label`.
        optional: Leave the responses to a record that has no reference without a score; by default it is an error.
    """

    inline: ClassVar[bool] = True
    field: str | None = None
    optional: bool = False

    def reference(self, record: dict[str, Any]) -> Any:
        """What is right; None if nothing is known and that is allowed.

        Raises:
            ConfigError: If nothing is known.
        """
        value = default_reference(record) if self.field is None else field_of(record, self.field)
        if value is None and not self.optional:
            missing = "no last message of the assistant and no label" if self.field is None else f"no '{self.field}'"
            found = ", ".join(f"'{key}'" for key in record)
            raise ConfigError(
                f"the record has {missing} to compare with (found: {found}). Add it, set 'field', or set "
                "'optional: true' to leave such records without a score."
            )
        return value

    def reference_text(self, record: dict[str, Any]) -> str | None:
        """The same as a text, white space at the ends aside; numbers and booleans as JSON writes them.

        Raises:
            ConfigError: If nothing is known, or it is a list or an object.
        """
        value = self.reference(record)
        if isinstance(value, dict | list):
            kind = "an object" if isinstance(value, dict) else "a list"
            raise ConfigError(f"what to compare with is {kind}, not a text. Set 'field', or use JsonEquality.")
        if value is None:
            return None
        return (value if isinstance(value, str) else json.dumps(value)).strip()


def record_messages(record: dict[str, Any]) -> list[Message]:
    """The messages of a record in any of the chat forms, or with a `prompt` alone.

    Raises:
        RecordError: If it has none.
    """
    whole = {"completion": [], **record} if "prompt" in record else record
    return read_record(whole, "the record", 0).messages


def prompt_messages(record: dict[str, Any]) -> list[Message]:
    """The messages up to the response that the record itself may have."""
    messages = record_messages(record)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def default_reference(record: dict[str, Any]) -> Any:
    """The record's own response, or else its label; None if it has neither."""
    last = record_messages(record)[-1]
    return last["content"] if last["role"] == "assistant" else record.get("label")


def field_of(record: dict[str, Any], path: str) -> Any:
    """The value under a dotted path; None if there is none."""
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
