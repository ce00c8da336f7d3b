"""What modules hand to tables of samples."""

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
class Confusion:
    """How often records of each class were given each class.

    Args:
        counts: A row for each true class, a column for each predicted one.
        labels: Names of the classes.
    """

    counts: list[list[int]]
    labels: list[str]
