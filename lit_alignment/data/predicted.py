"""What every data module asks in predict: prompts with a fingerprint, and the loader of those without an answer."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np

from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.encoding.rows import RowEncoder
from lit_alignment.data.examples import ExampleMaker, column
from lit_alignment.data.planned import PlannedDataModule
from lit_alignment.data.sources.cache import fingerprint
from lit_alignment.data.sources.record_batches import CachedRows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError


class PredictDataModule(PlannedDataModule):
    """Prompts of predict, and of validation as predict asks them; a method adds how a record becomes one.

    Attributes:
        val_fraction: Part of the training records that is held out for validation.
        batch_size: Prompts of a batch.
    """

    val_fraction: float
    batch_size: int
    whole_prompts = True  # whether a row of predict holds all tokens of its prompt

    def __init__(self) -> None:
        """Nothing is answered."""
        super().__init__()
        # Gives (dataset, id) of prompts that need no answer any more; asked when the loader is made.
        self.answered: Callable[[], set[tuple[str, str]]] = set

    # What a method adds.

    @abstractmethod
    def read(self, raw: object, where: str, position: int) -> Any:
        """One raw record, validated."""

    def read_prompt(self, raw: object, where: str, position: int) -> Any:
        """One raw record of predict or of cherry picks, validated."""
        return self.read(raw, where, position)

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of what is asked in predict: ROW_FEATURES and the method's own."""
        raise ConfigError(f"{type(self).__name__} has nothing to predict.")

    @abstractmethod
    def predict_row(self, record: Any, source: SourceConfig) -> dict[str, Any]:
        """Columns of what a record asks in predict, without ROW_FEATURES' own except `length`.

        Raises:
            Dropped: If there is nothing to ask.
        """

    @abstractmethod
    def predict_item(self, row: dict[str, Any], index: int) -> Any:
        """One row of `predict_features`; `index` is its position among all."""

    @abstractmethod
    def predict_collate(self, items: list[Any]) -> Any:
        """What `predict_step` gets."""

    @abstractmethod
    def decides_encoding(self) -> list[Any]:
        """What decides the columns of an example, for the cache's names."""

    def fingerprints(self) -> list[str]:
        """One for each row of predict: of its own columns, and of what it names."""
        return self.examples["predict"]["fingerprint"]

    # Prompts.

    @abstractmethod
    def sources_of(self, split: Any) -> list[SourceConfig]:
        """The sources whose records a split has."""

    @abstractmethod
    def _maker(self, prompts: bool) -> ExampleMaker:
        """What makes the examples, or the prompts of predict."""

    def prompt_rows(self) -> RowEncoder:
        """What encodes the prompts of predict."""
        decides = [] if self.whole_prompts else self.decides_encoding()
        features = datasets.Features({**self.predict_features, "fingerprint": datasets.Value("string")})
        return RowEncoder(lambda source: self.read_prompt, partial(self._asked_row, decides), features, asks=True)

    def _asked_row(self, decides: list[Any], record: Any, source: SourceConfig) -> dict[str, Any]:
        """`predict_row`, with the fingerprint of what an answer to it depends on, or repeats."""
        columns = self.predict_row(record, source)
        content = {name: value for name, value in columns.items() if name != "length"}
        return columns | {"fingerprint": fingerprint(content, decides)}

    def asked(self) -> dict[tuple[str, str], str]:
        """The fingerprint of each prompt by (dataset, id), in the order of the records.

        Raises:
            ConfigError: If two prompts have the same id in sources of the same name.
        """
        rows, found = self.examples["predict"], dict[tuple[str, str], str]()
        for key, own in zip(zip(rows["dataset"], rows["id"], strict=True), self.fingerprints(), strict=True):
            if found.setdefault(key, own) != own:
                raise ConfigError(
                    f"data.predict: two sources are named '{key[0]}', and both have a record '{key[1]}': one answer "
                    "would take the other's place. Give each source a 'name' of its own."
                )
        return found

    def predict_items(self, sources: Sequence[SourceConfig]) -> list[Any]:
        """What any sources ask in predict, in order, without a cache: for cherry picks."""
        return list(self._items(sources, lambda row: True))

    def validation_items(self) -> Iterator[Any]:
        """What the records that validate ask in predict, in order."""
        if not self.val_fraction:
            return self._items(self.sources_of("val"), lambda row: True)
        held = self.examples["val"]
        known = {(name, part) for name, own in zip(held["dataset"], held["id"], strict=True) for part in _parts(own)}
        return self._items(self.sources_of("val"), lambda row: (row["dataset"], row["id"]) in known)

    def _items(self, sources: Sequence[SourceConfig], wanted: Callable[[dict[str, Any]], bool]) -> Iterator[Any]:
        maker = self._maker(True)
        rows = (row for source in sources for row in maker.fresh_rows(source) if not row["dropped"] and wanted(row))
        return (self.predict_item(row, index) for index, row in enumerate(rows))

    def predict_dataloader(self) -> PlannedLoader[Any]:
        """Prompts that are not answered yet, longest first, so that a batch too large for the memory fails at once."""
        dataset = self.examples["predict"]
        answered = self.answered()
        order = np.argsort(-column(dataset, "length"), kind="stable").tolist()
        if answered:
            keys = list(zip(dataset["dataset"], dataset["id"], strict=True))
            order = [index for index in order if keys[index] not in answered]
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

        build = partial(self._prompts, dataset)
        plan = [PlannedBatch(group, 0.0) for group in groups[rank::world_size]]
        return PlannedLoader(lambda epoch: plan, build, len(plan))

    def _prompts(self, rows: CachedRows, planned: PlannedBatch) -> Any:
        asked = zip(rows.rows(planned.indices), planned.indices, strict=True)
        return self.predict_collate([self.predict_item(row, index) for row, index in asked])


def _parts(record_id: str) -> tuple[str, str]:
    """An id, and that of the record of which it may be a part."""
    return record_id, record_id.rpartition("#")[0]
