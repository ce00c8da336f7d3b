"""From a raw record to a row of an encoded data set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets

from lit_alignment.data.encoding.example import HISTORY_DIFFERS, Dropped
from lit_alignment.data.sources.columns import UnusableRecord
from lit_alignment.data.sources.records import SourceConfig

# What every row says, whatever the method.
ROW_FEATURES = {
    "id": datasets.Value("string"),
    "dataset": datasets.Value("string"),
    "dropped": datasets.Value("string"),
    "detail": datasets.Value("string"),
    "length": datasets.Value("int64"),
    "notes": datasets.List(datasets.Value("string")),
}
FURTHER = "further responses of split conversations"  # a note of all rows of a record but its first


@dataclass(frozen=True)
class Unusable:
    """A record whose cells are empty, or of the wrong type.

    Args:
        id: Its own, or its position.
        reason: To drop it.
        detail: Which cell it is, and where.
    """

    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class RowEncoder:
    """How raw records become rows.

    Args:
        reader: Of a source, what gives a validated record, with at least an `id`, of a raw one, its file and line, and
            its position.
        encode_record: The columns of a record but for those of ROW_FEATURES other than `length`; may raise Dropped.
        features: All columns.
        split: The parts of a record whose responses do not fit into one example; none if it has none.
        asks: Whether rows are prompts, which need no answer beside them.
    """

    reader: Callable[[SourceConfig], Callable[[object, str, int], Any]]
    encode_record: Callable[[Any, SourceConfig], dict[str, Any]]
    features: datasets.Features
    split: Callable[[Any], list[Any]] = lambda record: []
    asks: bool = False

    def read(self, raw: Any, where: str, position: int, source: SourceConfig) -> Any:
        """A validated record; one that lacks cells stays as it is, unless what is there can be asked.

        Args:
            raw: As its source gives it.
            where: File and line.
            position: In the source.
            source: Where it is from.
        """
        if not isinstance(raw, UnusableRecord):
            return self.reader(source)(raw, where, position)
        if self.asks and raw.can_be_asked:
            return self.reader(source)(raw.rest, where, position)
        return Unusable(str(raw.rest.get("id", position)), raw.reason, raw.detail)

    def rows(self, record: Any, source: SourceConfig) -> list[dict[str, Any]]:
        """The rows of a record: one, or one for each of its parts."""
        row = self.row(record, source)
        parts = self.split(record) if row["dropped"] == HISTORY_DIFFERS else []
        rows = [self.row(part, source) for part in parts] or [row]
        for further in rows[1:]:
            further["notes"] = [*further["notes"], FURTHER]
        return rows

    def row(self, record: Any, source: SourceConfig) -> dict[str, Any]:
        """The columns of a record; a dropped one carries its reason."""
        base = {"id": record.id, "dataset": source.title, "dropped": "", "detail": "", "notes": []}
        try:
            if isinstance(record, Unusable):
                raise Dropped(record.reason, record.detail)
            return base | self.encode_record(record, source)
        except Dropped as drop:
            empty: dict[str, Any] = {n: [] if isinstance(f, datasets.List) else None for n, f in self.features.items()}
            return {**empty, **base, "length": 0, "dropped": drop.reason, "detail": drop.detail}
