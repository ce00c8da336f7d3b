"""From a validated record to a row of an encoded data set."""

import json
from collections.abc import Callable
from typing import Any

import datasets

from lit_alignment.data.encoding.encoder import Dropped
from lit_alignment.data.encoding.messages import Record
from lit_alignment.data.sources.records import SourceConfig


class RowEncoder:
    """Encodes one row of a records data set; a class, so that it can be sent to worker processes.

    Args:
        source: Where the records are from.
        record_type: What a record is.
        encode_record: The columns of one, of those that say no more than where it is from; may raise Dropped.
        features: All columns.
    """

    def __init__(
        self,
        source: SourceConfig,
        record_type: type[Record],
        encode_record: Callable[[Any, SourceConfig], dict[str, Any]],
        features: datasets.Features,
    ) -> None:
        """Find the columns of a dropped record."""
        self.source, self.record_type, self.encode_record = source, record_type, encode_record
        self.empty: dict[str, Any] = {n: [] if isinstance(f, datasets.List) else None for n, f in features.items()}

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """The columns of a stored record."""
        return self.encode(self.record_type(**json.loads(row["record"])))

    def encode(self, record: Record) -> dict[str, Any]:
        """The columns of a record; a dropped one carries its reason."""
        base = {"id": record.id, "dataset": self.source.title, "dropped": "", "detail": ""}
        try:
            return base | self.encode_record(record, self.source)
        except Dropped as drop:
            return {**self.empty, **base, "length": 0, "dropped": drop.reason, "detail": drop.detail}
