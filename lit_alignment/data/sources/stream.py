"""Records of sources as they are read, pass after pass, in a seeded order that any process can take up again."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from lit_alignment.data.sources.choosing import nothing_in, source_generator
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError

Item = TypeVar("Item")
ENDED = -1  # records taken of a source that has none left in this pass


@dataclass(frozen=True)
class StreamMark:
    """A position in a stream.

    Args:
        records: Records before it.
        draws: How often a source was drawn.
        taken: For each source its whole passes, and the records taken of the pass that has begun, or ENDED.
    """

    records: int
    draws: int
    taken: tuple[tuple[int, int], ...]

    @property
    def passes(self) -> int:
        """Whole passes over all sources."""
        return min(passed for passed, _ in self.taken)


@dataclass(frozen=True)
class StreamedRecord:
    """A raw record with its place in the stream.

    Args:
        number: Records before it.
        source: Index of its source.
        position: In its source.
        where: File and line.
        raw: As it was read.
        behind: The stream's position behind it.
    """

    number: int
    source: int
    position: int
    where: str
    raw: Any
    behind: StreamMark


@dataclass(frozen=True)
class RecordStream:
    """The records of sources without an end, shuffled in a buffer of each.

    The next record is from a random one of the sources that have some left. Without weights each record is seen once
    in a pass; with weights, which say how often a source is drawn, a source that ends begins anew.

    Args:
        sources: The sources.
        seed: Of every order.
        buffer: Records of each source that are shuffled among each other; 1 keeps their order.
    """

    sources: Sequence[SourceConfig]
    seed: int
    buffer: int

    @property
    def begin(self) -> StreamMark:
        """Where the stream begins."""
        return StreamMark(0, 0, ((0, 0),) * len(self.sources))

    def records(self, mark: StreamMark) -> Iterator[StreamedRecord]:
        """The records behind a position, without an end; those of a begun pass before it are read and passed over.

        Raises:
            ConfigError: If a source gives none.
        """
        number, draws, taken = mark.records, mark.draws, list(mark.taken)
        passes: list[Iterator[tuple[int, str, Any]]] = [
            islice(self._shuffled(i, p), max(used, 0), None) for i, (p, used) in enumerate(taken)
        ]
        while True:
            left = [index for index, (_, used) in enumerate(taken) if used != ENDED]
            if not left:
                taken = [(passed + 1, 0) for passed, _ in taken]
                passes = [self._shuffled(index, passed) for index, (passed, _) in enumerate(taken)]
                continue
            index = self._drawn(left, draws)
            draws += 1
            passed, used = taken[index]
            record = next(passes[index], None)
            if record is None:
                if not used:
                    raise ConfigError(f"data.train: {nothing_in(self.sources[index])}")
                taken[index] = (passed, ENDED)
                if self.sources[index].weight is not None:
                    taken[index] = (passed + 1, 0)
                    passes[index] = self._shuffled(index, passed + 1)
                continue
            taken[index] = (passed, used + 1)
            number += 1
            yield StreamedRecord(number - 1, index, *record, behind=StreamMark(number, draws, tuple(taken)))

    def _drawn(self, left: list[int], draws: int) -> int:
        """The source of the next record, which depends on nothing but the number of earlier draws."""
        if len(left) == 1:
            return left[0]
        shares = np.cumsum([self.sources[index].weight or 1.0 for index in left])
        at = np.random.default_rng([self.seed, draws]).random() * shares[-1]
        return left[int(np.searchsorted(shares, at, side="right"))]

    def _shuffled(self, index: int, passed: int) -> Iterator[tuple[int, str, Any]]:
        """Position, place and raw record of all that a source chooses, in the order of one of its passes."""
        generator = source_generator(self.sources[index], self.seed, f"stream {passed}")
        return shuffled(chosen_records(self.sources[index], self.seed), self.buffer, generator)


def check_stream(sources: Sequence[SourceConfig], buffer: int) -> None:
    """Refuse what needs the number of records, which a stream does not know.

    Args:
        sources: Of training.
        buffer: `data.shuffle_buffer`.

    Raises:
        ConfigError: Naming the setting.
    """
    if buffer < 1:
        raise ConfigError(f"data.shuffle_buffer is {buffer}; use 1 (the order of the files) or more.")
    for source in sources:
        if source.num_samples is not None or source.repeat != 1.0:
            name = "repeat" if source.num_samples is None else "num_samples"
            raise ConfigError(
                f"source {source.title}: '{name}' needs the number of records, which streaming does not know. Use "
                "'sample_rate' for a part, or 'weight' for how often each source is drawn."
            )
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        without = sources[weighted.index(False)].title
        raise ConfigError(
            f"source {without}: has no 'weight', and others have. For streaming give all or none of them."
        )


def shuffled(items: Iterable[Item], size: int, generator: np.random.Generator) -> Iterator[Item]:
    """Each item once; whenever the buffer is full, a random one of it.

    Args:
        items: In order.
        size: Of the buffer.
        generator: Draws.
    """
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        index = int(generator.integers(size))
        yield buffer[index]
        buffer[index] = item
    for index in generator.permutation(len(buffer)) if size > 1 else range(len(buffer)):
        yield buffer[index]


def chosen_records(source: SourceConfig, seed: int) -> Iterator[tuple[int, str, Any]]:
    """Position, place and raw record of those that `offset`, `num_rows` and `sample_rate` keep, in order.

    Args:
        source: Without `num_samples`, which needs the number of its records.
        seed: Of the choice, which is that of `choose_records`.
    """
    stop = float("inf") if source.num_rows is None else source.offset + source.num_rows
    generator = source_generator(source, seed, "sample_rate")
    for position, (where, raw) in enumerate(source.read(streaming=True)):
        if position >= stop:
            return
        if position >= source.offset and (source.sample_rate is None or generator.random() < source.sample_rate):
            yield position, where, raw
