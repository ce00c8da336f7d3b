"""From sources to the examples of an epoch: read, choose, encode once into a cache, mix, report."""

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm
from numpy.typing import NDArray

from lit_alignment.data.encoding.rows import FURTHER, ROW_FEATURES, RowEncoder
from lit_alignment.data.sources.cache import cached_rows, files_fingerprint, fingerprint, source_fingerprint
from lit_alignment.data.sources.choosing import (
    mixture_repeats,
    nothing_in,
    record_filter,
    repeat_records,
    source_generator,
)
from lit_alignment.data.sources.parallel import ordered_map
from lit_alignment.data.sources.record_batches import CachedRows, joined
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.sources.report import DataReport
from lit_alignment.data.sources.splitting import held_out
from lit_alignment.errors import ConfigError, RecordError

ROOT = Path(__file__).parent.parent.parent  # where the package is
PARTS = ("lit_alignment.data.", "lit_alignment.errors")  # what may decide a row
LATER = "lit_alignment.data.batching."  # decides batches of rows, and no row


HeldOut = Callable[[SourceConfig, CachedRows], NDArray[np.bool_]]


@dataclass(frozen=True)
class ExampleMaker:
    """Makes the examples of sources.

    Args:
        rows: How a record becomes a row.
        decides: What decides a row besides its source and the seed, for the cache's names.
        cache_dir: Where encoded data are kept.
        seed: Seed of every choice.
        num_proc: Processes that read and encode; None for as many as there are cores, where a source is large.
    """

    rows: RowEncoder
    decides: list[Any]
    cache_dir: Path
    seed: int
    num_proc: int | None = None

    def load(
        self, sources: Sequence[SourceConfig], split: str, held: HeldOut | None = None
    ) -> tuple[CachedRows, DataReport]:
        """The examples of an epoch over all sources, and what became of their records.

        Args:
            sources: The sources.
            split: What they are for: `train` leaves out what is held out of them, `val` takes that alone, once.
            held: Which rows of a source are held out; None where nothing is.

        Raises:
            ConfigError: If a source has no record, or chooses none.
        """
        report = DataReport(split)
        parts = []
        for source in sources:
            encoded = self.encoded(source)
            if not len(encoded):
                raise ConfigError(f"data.{split}: {nothing_in(source)}")
            if held is not None:
                encoded.positions = np.flatnonzero(held(source, encoded) == (split == "val"))
            columns = {name: encoded.column(name) for name in ("dropped", "detail", "notes")}
            notes = _counts(pc.list_flatten(columns["notes"]))
            records = len(encoded) - notes[FURTHER]
            report.sources[source.title] = report.sources.get(source.title, 0) + records
            report.notes.update(notes)
            kept = pc.equal(columns["dropped"], "")
            report.dropped.update(_counts(columns["dropped"].filter(pc.invert(kept))))
            for reason in report.dropped:
                told = columns["detail"].filter(pc.equal(columns["dropped"], reason))
                if len(told) and told[0].as_py():
                    report.details.setdefault(reason, told[0].as_py())
            parts.append((encoded, encoded.positions[kept.to_numpy()]))
        repeats = mixture_repeats(sources, [len(indices) for _, indices in parts])
        if held is not None and split == "val":
            repeats = [1.0] * len(parts)
        mixed = []
        for source, (encoded, indices), repeat in zip(sources, parts, repeats, strict=True):
            encoded.positions = repeat_records(indices, repeat, source_generator(source, self.seed, "repeat"))
            mixed.append(encoded)
        dataset = joined(mixed)
        lengths = column(dataset, "length")
        report.examples, report.tokens = len(dataset), int(lengths.sum())
        report.longest = int(lengths.max(initial=0))
        if "num_trained" in self.rows.features:
            report.trained_tokens = int(column(dataset, "num_trained").sum())
        return dataset, report

    def encoded(self, source: SourceConfig) -> CachedRows:
        """The rows of a source's chosen records, from the cache if they are there; dropped ones carry their reason."""
        decides = source_fingerprint(source, self.cache_dir), asdict(source)
        path = self.cache_dir / f"examples-{fingerprint(self.decides, *decides, self.seed)}.arrow"
        features = self.rows.features
        numbers = [
            name for name, kind in features.items() if isinstance(kind, datasets.Value) and kind.dtype != "string"
        ]
        # What plans are made of is read whole, and at once.
        return cached_rows(path, lambda: self._validated_rows(source), features, [*ROW_FEATURES, *numbers])

    def fresh_rows(self, source: SourceConfig) -> Iterator[dict[str, Any]]:
        """The rows of a source's chosen records, without the cache; the other records are not looked at."""
        wanted = record_filter(source, self.seed)
        for position, (where, raw) in enumerate(source.read()):
            if wanted(position):
                yield from self.rows.rows(self.rows.read(raw, where, position, source), source)

    def _validated_rows(self, source: SourceConfig) -> Iterator[dict[str, Any]]:
        """The same; all records of the source are validated, and their ids are all different.

        Raises:
            RecordError: If a record cannot be used, or has another one's id.
        """
        wanted = record_filter(source, self.seed)

        def encode(numbered: tuple[int, tuple[str, Any]]) -> tuple[str, str, list[dict[str, Any]]]:
            position, (where, raw) = numbered
            record = self.rows.read(raw, where, position, source)
            return record.id, where, self.rows.rows(record, source) if wanted(position) else []

        positions: dict[str, int] = {}
        found = ordered_map(encode, enumerate(source.read()), self.num_proc)
        for position, (record_id, where, rows) in enumerate(tqdm(found, f"Encoding {source.title}", unit="")):
            first = positions.setdefault(record_id, position)
            if first != position:
                before, _ = next(islice(source.read(), first, None))
                raise RecordError(where, "id", f"'{record_id}' is also the id of {before}", "Give each record its own.")
            yield from rows


def column(dataset: CachedRows, name: str) -> np.ndarray[Any, Any]:
    """A column of numbers, or of lists of equally many, without a Python object for each.

    Args:
        dataset: Any, as long as it is.
        name: The column.

    Returns:
        Of shape [len(dataset)], or [len(dataset), numbers in each].

    Raises:
        CacheError: If it is damaged.
    """
    values = dataset.column(name)
    if not pa.types.is_list(values.type):
        return np.asarray(values)
    return np.asarray(pc.list_flatten(values)).reshape(len(dataset), -1)


def held_rows(
    rows: CachedRows, classes: NDArray[np.float64], fraction: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Which rows of a source are held out, [len(rows)]: all those of the records that are drawn.

    Args:
        rows: Of all records, dropped ones too.
        classes: Of each row.
        fraction: Part of the records to draw.
        generator: Draws.
    """
    kept: NDArray[np.bool_] = np.asarray(rows.column("dropped")) == ""
    numbers = _record_numbers(rows)
    records, first = np.unique(numbers[kept], return_index=True)
    held = held_out(classes[kept][first], fraction, generator)
    return np.logical_and(kept, np.isin(numbers, records[held]))


def _record_numbers(rows: CachedRows) -> NDArray[np.int64]:
    """The record of each row, counted from 0, [len(rows)]: one that was split has several."""
    notes = rows.column("notes").combine_chunks()
    begins = np.ones(len(rows), dtype=np.int64)
    begins[np.asarray(pc.list_parent_indices(notes))[np.asarray(pc.equal(pc.list_flatten(notes), FURTHER))]] = 0
    return np.cumsum(begins) - 1


def _counts(values: pa.ChunkedArray) -> Counter[str]:
    return Counter({pair["values"].as_py(): pair["counts"].as_py() for pair in pc.value_counts(values)})


@cache
def code_fingerprint(modules: tuple[str, ...]) -> str:
    """A hash of the code that makes rows, so that a cache is never read by another version; once per process.

    Args:
        modules: The modules in which a method's data module is written.
    """
    return files_fingerprint(code_files(modules))


def code_files(modules: Iterable[str]) -> set[Path]:
    """The files of some modules, and of what these import of the package's reading and encoding, at any depth.

    Args:
        modules: Names of imported modules, of this package or another one.
    """
    own = [vars(sys.modules[name]).get("__file__") for name in modules]  # None in a notebook
    open_files = [Path(path) for path in own if path is not None]
    open_files += (ROOT / "lit_alignment/data/encoding").glob("*.py")
    found: set[Path] = set()
    while open_files:
        file = open_files.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            names = [name for name in names if name.startswith(PARTS) and not name.startswith(LATER)]
            files = [ROOT / f"{name.replace('.', '/')}.py" for name in names]
            open_files += [file for file in files if file.is_file()]
    return found
