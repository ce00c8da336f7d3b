"""Batches of examples that come one by one: packed in blocks, and counted one optimizer step ahead."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np

from lit_alignment.data.batching.packing import PlannedBatch, pack
from lit_alignment.data.sources.stream import StreamMark

Batch = TypeVar("Batch")
Row = dict[str, Any]

BLOCK_BATCHES = 32  # micro-batches that are packed from the same examples; more packs tighter and starts later


@dataclass(frozen=True)
class StreamPosition:
    """Where a rank stands in its examples.

    Args:
        mark: Where in the records its block begins.
        block: Number of the block.
        used: Micro-batches of the block that were trained.
    """

    mark: StreamMark
    block: int = 0
    used: int = 0


@dataclass(frozen=True)
class StreamedWindow:
    """The micro-batches of one rank in one optimizer step.

    Args:
        batches: Rows of each.
        behind: The rank's position behind it.
    """

    batches: list[list[Row]]
    behind: StreamPosition

    @property
    def counts(self) -> tuple[float, int, int]:
        """Trained weight, number of examples, and their tokens."""
        rows = list(chain.from_iterable(self.batches))
        return sum(row["weight"] for row in rows), len(rows), sum(row["length"] for row in rows)

    def planned(self, totals: Sequence[float]) -> tuple["StreamedRows", list[PlannedBatch]]:
        """The rows of the window, and its micro-batches by index into these.

        Args:
            totals: `counts`, summed over all ranks.
        """
        rows = list(chain.from_iterable(self.batches))
        indices = iter(range(len(rows)))
        groups = [list(islice(indices, len(batch))) for batch in self.batches]
        weight, examples, tokens = totals
        window: list[list[int]] = [[i for i in group if rows[i]["weight"] > 0] for group in groups]
        planned = []
        for number, group in enumerate(groups):
            share = sum(rows[i]["length"] for i in group) / tokens
            own = window if number == 0 else []
            planned.append(PlannedBatch(group, weight, int(examples), share=share, window=own))
        return StreamedRows(rows), planned


@dataclass(frozen=True)
class StreamedRows:
    """Encoded rows by index, as those of a file are."""

    values: list[Row]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.values)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows at some indices."""
        return [self.values[index] for index in indices]


@dataclass(frozen=True)
class StreamPlan:
    """What decides the micro-batches of examples in their order.

    Args:
        tokens_per_batch: Tokens in a packed row; None takes `batch_size` examples a batch instead. An example that is
            longer has a row of its own.
        batch_size: Examples in an unpacked batch.
        seed: Of the order of rows within a block.
    """

    tokens_per_batch: int | None
    batch_size: int
    seed: int

    def windows(
        self, examples: Iterator[tuple[StreamMark, list[Row]]], position: StreamPosition, accumulate: int
    ) -> Iterator[StreamedWindow]:
        """The optimizer steps of one rank, without an end.

        Args:
            examples: For each record behind the position's mark the mark behind it, and its rows.
            position: Where to begin.
            accumulate: Micro-batches of a step.
        """
        batches = self._batches(examples, position)
        while window := list(islice(batches, accumulate)):
            yield StreamedWindow([batch for batch, _ in window], window[-1][1])

    def _batches(
        self, examples: Iterator[tuple[StreamMark, list[Row]]], position: StreamPosition
    ) -> Iterator[tuple[list[Row], StreamPosition]]:
        mark, block, skipped = position.mark, position.block, position.used
        for rows, behind in self._blocks(examples, mark):
            groups = self._groups([row["length"] for row in rows], block)
            for used in range(skipped, len(groups)):
                yield [rows[i] for i in groups[used]], StreamPosition(mark, block, used + 1)
            mark, block, skipped = behind, block + 1, 0

    def _blocks(
        self, examples: Iterator[tuple[StreamMark, list[Row]]], begin: StreamMark
    ) -> Iterator[tuple[list[Row], StreamMark]]:
        """The rows of as many records as fill a block, or of the last ones of a pass, and the mark behind them."""
        wanted = BLOCK_BATCHES * (self.tokens_per_batch or self.batch_size)
        rows: list[Row] = []
        size = 0
        for mark, found in examples:
            if mark.passes > begin.passes and rows:
                yield rows, begin
                rows, size = [], 0
            rows += found
            size += len(found) if self.tokens_per_batch is None else sum(row["length"] for row in found)
            begin = mark
            if size >= wanted:
                yield rows, begin
                rows, size = [], 0

    def _groups(self, lengths: list[int], block: int) -> list[list[int]]:
        """The micro-batches of a block, by index."""
        if self.tokens_per_batch is None:
            return [
                list(range(i, min(i + self.batch_size, len(lengths)))) for i in range(0, len(lengths), self.batch_size)
            ]
        groups = pack([min(length, self.tokens_per_batch) for length in lengths], self.tokens_per_batch)
        return [groups[i] for i in np.random.default_rng([self.seed, block]).permutation(len(groups))]


class StreamedLoader(Generic[Batch]):
    """Yields batches without an end, so it has no length; Lightning leaves it alone, as it is no DataLoader.

    Args:
        batches: Begins where the training stands.
    """

    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        """Nothing is read yet."""
        self.batches = batches

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for a sampler."""
        return SimpleNamespace(sampler=self, batch_size=1)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: there is one epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module stores the position. Lightning warns of loaders that cannot resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches that follow."""
        return self.batches()
