"""What modules hand to tables of samples and to reports."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ScoredSample:
    """What a model makes of one record, for people to look at.

    Args:
        text: Its scores or its prediction, as text.
        columns: What a table shows, by column.
        scores: Numbers by name.
        right: Whether the model agrees with the record; None if the record says nothing.
    """

    text: str
    columns: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    right: bool | None = None


@dataclass(frozen=True)
class NotableResponse:
    """A response that was sampled in training, for people to look at.

    Args:
        title: What is notable about it.
        messages: Its prompt.
        text: The response.
        scores: Its rewards by name.
        truncated: Whether it was cut at the limit of tokens.
    """

    title: str
    messages: list[dict[str, Any]]
    text: str
    scores: dict[str, float]
    truncated: bool


@dataclass(frozen=True)
class Confusion:
    """How often records of each class were given each class.

    Args:
        counts: A row for each true class, a column for each predicted one.
        labels: Names of the classes.
    """

    counts: list[list[int]]
    labels: list[str]
