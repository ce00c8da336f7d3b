"""Rewards that look at the text of a response, and at what the record says is right."""

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lit_alignment.data.sources.values import parse_json
from lit_alignment.errors import ConfigError
from lit_alignment.rollout.rewards import ReferenceReward, RewardFunction, ScoreList

FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)


@dataclass(kw_only=True, eq=False)
class ExactMatchReward(ReferenceReward):
    """1 for a response that equals the reference, white space at the ends aside, and 0 for others.

    Args:
        ignore_case: Take upper and lower case for the same.
    """

    ignore_case: bool = False

    def __call__(self, responses: list[str], record: dict[str, Any]) -> ScoreList:
        """1 or 0 for each."""
        reference = self.reference_text(record)
        if reference is None:
            return [None] * len(responses)
        return [float(same_text(response, reference, self.ignore_case)) for response in responses]


@dataclass(kw_only=True, eq=False)
class RegexMatch(ReferenceReward):
    """1 for a response that a regular expression matches, and 0 for others.

    Args:
        pattern: In Python's syntax; `(?s)` at its beginning lets a dot match line breaks.
        full: Whether it has to match the whole response, white space at the ends aside, or a part of it.
        group: Number or name of a group that has to equal the reference, in the first match; without it there is no
            reference.
        ignore_case: Take upper and lower case for the same.
    """

    pattern: str
    full: bool = False
    group: int | str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        """Compile the pattern."""
        super().__post_init__()
        self._expression = compiled(self, self.pattern, re.IGNORECASE if self.ignore_case else 0)
        if self.group is None and (self.field is not None or self.optional):
            raise self.refusal("'field' and 'optional' have no effect without a group. Set group, or remove them")
        if self.group is not None and self.group not in (
            *range(self._expression.groups + 1),
            *self._expression.groupindex,
        ):
            raise self.refusal(f"the pattern has no group {self.group!r}. Put that part of it in brackets")

    def __call__(self, responses: list[str], record: dict[str, Any]) -> ScoreList:
        """1 or 0 for each."""
        reference = None if self.group is None else self.reference_text(record)
        if self.group is not None and reference is None:
            return [None] * len(responses)
        return [float(self._matches(response.strip(), reference)) for response in responses]

    def _matches(self, response: str, reference: str | None) -> bool:
        found = self._expression.fullmatch(response) if self.full else self._expression.search(response)
        if found is None or self.group is None or reference is None:
            return found is not None
        part = found[self.group]
        return part is not None and same_text(part, reference, self.ignore_case)


@dataclass(kw_only=True, eq=False)
class JsonEquality(ReferenceReward):
    """1 for a response that is JSON with the same value as the reference, and 0 for others.

    Order of keys and white space do not count, and 1 equals 1.0 but not true. The response may stand in a ```json
    fence, and nothing else beside it; the reference is any value, or a text that holds JSON. NaN, and an object with
    a key twice, are no JSON.

    Args:
        per_field: Where both are objects, score the share of equal fields among those that either has.
    """

    per_field: bool = False

    def __call__(self, responses: list[str], record: dict[str, Any]) -> ScoreList:
        """A number from 0 to 1 for each."""
        reference = self.reference(record)
        if reference is None:
            return [None] * len(responses)
        if isinstance(reference, str):
            try:
                reference = parse_json(reference)
            except ValueError as error:
                problem = f"what to compare with is not JSON ({error})"
                raise ConfigError(f"{problem}. Correct it, or set 'field' to what is.") from error
        return [self._score(response, reference) for response in responses]

    def _score(self, response: str, reference: Any) -> float:
        fenced = FENCED.fullmatch(response.strip())
        try:
            value = parse_json(fenced[1] if fenced else response)
        except ValueError:
            return 0.0
        if not (self.per_field and isinstance(value, dict) and isinstance(reference, dict)):
            return float(same_value(value, reference))
        known = value.keys() | reference.keys()
        equal = sum(same_value(value[key], reference[key]) for key in value.keys() & reference.keys())
        return equal / len(known) if known else 1.0


@dataclass(kw_only=True, eq=False)
class LengthReward(RewardFunction):
    """1 for a response whose length is in a range, falling in a straight line to 0 outside of it.

    score = max(0, 1 - distance to the range / tolerance)

    Args:
        minimum: Shortest length of the range.
        maximum: Longest length of it; None has no limit.
        unit: What is counted; words are what white space separates.
        tolerance: How far outside the score has fallen to 0; with 1 all that is outside has 0.
    """

    inline: ClassVar[bool] = True
    minimum: int = 0
    maximum: int | None = None
    unit: Literal["characters", "words"] = "words"
    tolerance: int = 1

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.maximum is None and self.minimum == 0:
            raise self.refusal("every length is in the range. Set minimum, maximum, or both")
        if self.minimum < 0 or self.tolerance < 1 or (self.maximum is not None and self.maximum < self.minimum):
            given = f"minimum is {self.minimum}, maximum {self.maximum}, tolerance {self.tolerance}"
            raise self.refusal(f"{given}; use 0 <= minimum <= maximum, and a tolerance of 1 or more")

    def __call__(self, responses: list[str], record: dict[str, Any]) -> ScoreList:
        """A number from 0 to 1 for each."""
        lengths = [len(each.split()) if self.unit == "words" else len(each) for each in responses]
        return [max(0.0, 1 - self._distance(length) / self.tolerance) for length in lengths]

    def _distance(self, length: int) -> int:
        return max(self.minimum - length, 0 if self.maximum is None else length - self.maximum, 0)


@dataclass(kw_only=True, eq=False)
class FormatReward(RewardFunction):
    """1 for a response of a given form, and 0 for others. White space at the ends does not count.

    Args:
        tags: Names of tags of which the response consists: `[think, answer]` asks for
            `<think>...</think> <answer>...</answer>`, each once, in this order, with nothing beside them.
        pattern: Instead, a regular expression in Python's syntax that matches the whole response; `(?s)` at its
            beginning lets a dot match line breaks.
    """

    inline: ClassVar[bool] = True
    tags: list[str] | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        """Compile the form."""
        super().__post_init__()
        if (not self.tags) == (not self.pattern):
            raise self.refusal("give either tags or a pattern")
        tags = self.tags or []
        if len(set(tags)) < len(tags) or not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
            raise self.refusal(f"tags are {json.dumps(tags)}; use different names, such as [think, answer]")
        pattern = r"\s*".join(f"<{tag}>.*?</{tag}>" for tag in tags)
        self._expression = compiled(self, self.pattern) if self.pattern else re.compile(pattern, re.DOTALL)

    def __call__(self, responses: list[str], record: dict[str, Any]) -> ScoreList:
        """1 or 0 for each."""
        return [float(self._fits(response.strip())) for response in responses]

    def _fits(self, response: str) -> bool:
        marks = [mark for tag in self.tags or [] for mark in (f"<{tag}>", f"</{tag}>")]
        once = all(response.count(mark) == 1 for mark in marks)  # also spares the pattern's dots their long ways
        return once and self._expression.fullmatch(response) is not None


def compiled(reward: RewardFunction, pattern: str, flags: int = 0) -> re.Pattern[str]:
    """A regular expression of a configuration.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise reward.refusal(f"pattern {pattern!r} is no regular expression ({error}). Correct it") from error


def same_text(text: str, reference: str, ignore_case: bool = False) -> bool:
    """Whether two texts are equal, white space at the ends aside."""
    pair = text.strip(), reference.strip()
    return pair[0].casefold() == pair[1].casefold() if ignore_case else pair[0] == pair[1]


def same_value(value: Any, reference: Any) -> bool:
    """Whether two values of JSON are equal; Python itself takes true for 1."""
    if isinstance(value, dict) and isinstance(reference, dict):
        return value.keys() == reference.keys() and all(same_value(value[key], reference[key]) for key in value)
    if isinstance(value, list) and isinstance(reference, list):
        return len(value) == len(reference) and all(map(same_value, value, reference))
    if isinstance(value, bool) or isinstance(reference, bool):
        return value is reference
    return bool(value == reference)
