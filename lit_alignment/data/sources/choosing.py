"""Which records of each source are seen, each choice seeded by the source alone."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lit_alignment.data.sources.records import SourceConfig

Indices = NDArray[np.int64]


def source_generator(source: SourceConfig, seed: int, purpose: str) -> np.random.Generator:
    """A random generator that depends on the source, the seed and the purpose, not on the order of calls."""
    digest = hashlib.sha256(f"{seed}/{source.title}/{source.path}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def choose_records(source: SourceConfig, num_records: int, seed: int) -> Indices:
    """Indices of the records that `offset`, `num_rows`, `num_samples` and `sample_rate` keep, in file order."""
    stop = num_records if source.num_rows is None else min(num_records, source.offset + source.num_rows)
    chosen = np.arange(min(source.offset, stop), stop, dtype=np.int64)
    if source.num_samples is not None and source.num_samples < len(chosen):
        drawn = source_generator(source, seed, "num_samples").choice(len(chosen), source.num_samples, replace=False)
        return chosen[np.sort(drawn)]
    if source.sample_rate is not None:
        return chosen[source_generator(source, seed, "sample_rate").random(len(chosen)) < source.sample_rate]
    return chosen


def record_filter(source: SourceConfig, seed: int) -> Callable[[int], bool]:
    """Whether the record at a position is one of those that `choose_records` keeps, for reading them one by one.

    Drawing needs the number of records, so these are counted first where the source draws.
    """
    if source.num_samples is None and source.sample_rate is None:
        stop = float("inf") if source.num_rows is None else source.offset + source.num_rows
        return lambda position: source.offset <= position < stop
    kept = np.zeros(sum(1 for _ in source.read()), dtype=bool)
    kept[choose_records(source, len(kept), seed)] = True
    return lambda position: bool(kept[position])


def nothing_in(source: SourceConfig) -> str:
    """Why a source gives no record: its files hold none, or its settings choose none of them."""
    number = sum(1 for _ in source.read())
    place = f"source '{source.title}'" + (f" ({source.path})" if source.path else "")
    if not number:
        return f"{place} holds no records. Fill it, or remove the source."
    choice = {"offset": source.offset, "num_rows": source.num_rows, "num_samples": source.num_samples}
    given = {name: value for name, value in (choice | {"sample_rate": source.sample_rate}).items() if value is not None}
    shown = ", ".join(f"{name}: {value}" for name, value in given.items())
    return f"{place} chooses none of its {number} records by {shown}. Change these, or remove the source."


def repeat_records(indices: Indices, times: float, generator: np.random.Generator) -> Indices:
    """Each index floor(times) times, plus a random part of them for the fraction that is left."""
    whole, rest = divmod(times * len(indices), len(indices)) if len(indices) else (0, 0)
    extra = np.sort(generator.choice(len(indices), round(rest), replace=False)) if len(indices) else indices
    return np.concatenate([np.tile(indices, int(whole)), indices[extra]])


def mixture_repeats(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[float]:
    """How often each source's records are seen in an epoch.

    Sources with a `weight` share the total number of their records in proportion to the weights; the others
    keep their `repeat`.
    """
    weighted = [index for index, source in enumerate(sources) if source.weight is not None and sizes[index]]
    total_weight = sum(sources[index].weight or 0.0 for index in weighted)
    total_size = sum(sizes[index] for index in weighted)
    repeats = [source.repeat for source in sources]
    for index in weighted:
        repeats[index] = (sources[index].weight or 0.0) / total_weight * total_size / sizes[index]
    return repeats
