"""Read records from files, the hub, or the config itself, with the place of each."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from lit_alignment.data.sources.columns import (
    Columns,
    UnusableRecord,
    as_fields,
    check_columns,
    check_header,
    own_columns,
    texts_as_values,
)
from lit_alignment.data.sources.hub import hub_files, hub_rows, is_hub_layout
from lit_alignment.data.sources.readers import (
    READERS,
    enumerate_as,
    header_of,
    kind_of,
    plain_records,
    read_file,
    table_rows,
)
from lit_alignment.data.sources.values import RecordLimitsConfig
from lit_alignment.errors import ConfigError

MOST_REPEATS = 1_000_000


@dataclass(frozen=True)
class SourceConfig:
    """Where records come from, and which of them to take.

    Args:
        path: A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; .jsonl, .csv and .tsv also compressed, as
            .jsonl.gz or .jsonl.zst), a folder of such files, a folder in the layout of the hub, one that `save_to_disk`
            of Hugging Face datasets has written, or the name of a data set on the hub.
        records: The records themselves, instead of a path.
        name: The name in reports and predictions; the file's stem by default.
        split: Split of a hub data set (`train` by default), or of a folder with several.
        subset: Configuration of a hub data set, or a folder in it.
        columns: Which column holds each field, as `{prompt: question, completion: answer}`; a text with columns in
            braces makes the field of them, as `{text: "Classify: {review}"}`. Other columns are left out. Or the name
            of a form: `alpaca`, `hh` (Anthropic's), `sharegpt`, `ultrafeedback` (binarized).
        offset: First record to take.
        num_rows: Number of records to take from `offset` on.
        num_samples: Draw this many of them, seeded.
        sample_rate: Keep each of them with this probability, seeded.
        repeat: How often each record is seen in an epoch; 1.5 adds a seeded half.
        weight: Share of this source in an epoch, relative to the other sources' weights.
        system_prompt: Replaces the system message of each conversation.
        limits: What a record may hold at most.
    """

    path: str | None = None
    records: list[dict[str, Any]] | None = None
    name: str | None = None
    split: str | None = None
    subset: str | None = None
    columns: Columns | None = None
    offset: int = 0
    num_rows: int | None = None
    num_samples: int | None = None
    sample_rate: float | None = None
    repeat: float = 1.0
    weight: float | None = None
    system_prompt: str | None = None
    limits: RecordLimitsConfig = field(default_factory=RecordLimitsConfig)

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if (not self.path) == (self.records is None):
            raise ConfigError(f"source {self.title}: give either 'path' or 'records'.")
        if self.num_samples is not None and self.sample_rate is not None:
            raise ConfigError(f"source {self.title}: give 'num_samples' or 'sample_rate', not both.")
        if self.weight is not None and self.repeat != 1.0:
            raise ConfigError(f"source {self.title}: give 'weight' or 'repeat', not both.")
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise ConfigError(f"source {self.title}: sample_rate is {self.sample_rate}; use a number in (0, 1].")
        weight = 1.0 if self.weight is None else self.weight
        if not (0 < self.repeat <= MOST_REPEATS and 0 < weight < inf):
            raise ConfigError(
                f"source {self.title}: 'repeat' (at most {MOST_REPEATS}) and 'weight' must be finite and above 0."
            )
        if min(self.offset, self.num_rows or 0, self.num_samples or 0) < 0:
            raise ConfigError(f"source {self.title}: 'offset', 'num_rows' and 'num_samples' must be 0 or more.")
        check_columns(self.columns, self.title)

    @property
    def title(self) -> str:
        """The name in reports and predictions."""
        return self.name or (Path(self.path).name.removesuffix(_ends(Path(self.path))) if self.path else "records")

    def files(self) -> list[Path]:
        """The local files behind `path`; none for inline records and hub names.

        Raises:
            FileNotFoundError: If `path` looks like a file and is not there.
            ConfigError: If there is something else.
        """
        if self.path is None:
            return []
        path = Path(os.path.expanduser(self.path))
        # These functions answer where the methods of paths raise: names too long, loops of links.
        if os.path.isfile(path / "dataset_dict.json"):
            path = self._split_of(path)
        if os.path.isdir(path):
            if is_hub_layout(path, self.subset, self.split):
                return hub_files(path, self.subset, self.split)
            saved = (path / "state.json").is_file()  # its JSON files describe the data
            kinds = (".arrow",) if saved else tuple(READERS)
            files = sorted(f for f in path.iterdir() if kind_of(f) in kinds and not f.name.startswith("cache-"))
            files = [file for file in files if file.is_file()]
            if not files and (path / "data").is_dir():
                return hub_files(path, self.subset, self.split)
            if not files:
                raise ConfigError(f"{path}: no {', '.join(READERS)} file in this folder.")
            return files
        if os.path.isfile(path):
            return [path]
        if os.path.exists(path):
            raise ConfigError(f"{path}: neither a file nor a folder (source '{self.title}'). Copy it to a file first.")
        if path.suffix or self.path.count("/") != 1:
            raise FileNotFoundError(
                f"{path}: no such file (source '{self.title}', looked from {Path.cwd()}). Check data's 'path'."
            )
        return []

    def _split_of(self, folder: Path) -> Path:
        """The folder of one of the splits that Hugging Face datasets has saved together."""
        splits = sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file())
        if self.split not in splits:
            raise ConfigError(
                f"{folder}: holds the splits {', '.join(splits)}, and split is {self.split or 'not given'} "
                f"(source '{self.title}'). Set 'split' to one of them."
            )
        return folder / str(self.split)

    def read(self, streaming: bool = False) -> Iterator[tuple[str, Any]]:
        """Yield (where, raw record) for each record in order; in the place of one that lacks cells an UnusableRecord.

        Args:
            streaming: Keep nothing of a hub data set on the disk.

        Raises:
            RecordError: If a file cannot be read, or a record is beyond the limits.
        """
        if self.records is not None:
            yield from self._fields(plain_records(enumerate_as(self.title, self.records), self.limits))
            return
        files = self.files()
        if not files:
            rows = hub_rows(str(self.path), self.subset, self.split, streaming)
            records = plain_records(table_rows(str(self.path), rows.batches), self.limits, table=True)
            yield from records if self.columns is None else self._fields(records, rows.header, str(self.path))
        for file in files:
            of_texts = kind_of(file) in (".csv", ".tsv")
            header = header_of(file, self.limits) if of_texts or self.columns is not None else None
            records = self._fields(read_file(file, self.limits), header, str(file))
            if of_texts:
                records = ((where, _typed(record)) for where, record in records)
            yield from records

    def _fields(
        self, records: Iterator[tuple[str, Any]], header: Collection[str] | None = None, table: str = ""
    ) -> Iterator[tuple[str, Any]]:
        """The same records, with the fields that `columns` makes of theirs; those of a table by itself if it is None.

        Args:
            records: As read.
            header: Names of a table's columns.
            table: Its name.
        """
        columns = own_columns(header) if self.columns is None and header is not None else self.columns
        if columns is None:
            yield from records
            return
        if header:
            check_header(columns, header, table)
        for where, record in records:
            yield where, as_fields(record, columns, where, header)


def is_data_set(folder: Path, subset: str | None, split: str | None) -> bool:
    """Whether a folder is a data set of Hugging Face's, as `save_to_disk` or the hub lays one out.

    Args:
        folder: The folder.
        subset: A configuration that is asked for.
        split: A split that is asked for.
    """
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or is_hub_layout(folder, subset, split)


def _ends(path: Path) -> str:
    """The ends of a file's name that say what it holds."""
    return path.suffix if kind_of(path) == path.suffix else kind_of(path) + path.suffix


def _typed(record: Any) -> Any:
    if isinstance(record, UnusableRecord):
        return replace(record, rest=texts_as_values(record.rest))
    return texts_as_values(record)
