"""Read records from files, the hub, or the config itself, with the place of each."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.paths import look_for_hub

MOST_REPEATS = 1_000_000


@dataclass(frozen=True)
class SourceConfig:
    """Where records come from, and which of them to take.

    Args:
        path: A file (.jsonl, .json, .parquet, .arrow), a folder of such files, one that `save_to_disk` of Hugging Face
            datasets has written, or the name of a data set on the hub.
        records: The records themselves, instead of a path.
        name: The name in reports and predictions; the file's stem by default.
        split: Split of a hub data set.
        subset: Configuration name of a hub data set.
        offset: First record to take.
        num_rows: Number of records to take from `offset` on.
        num_samples: Draw this many of them, seeded.
        sample_rate: Keep each of them with this probability, seeded.
        repeat: How often each record is seen in an epoch; 1.5 adds a seeded half.
        weight: Share of this source in an epoch, relative to the other sources' weights.
        system_prompt: Replaces the system message of each conversation.
    """

    path: str | None = None
    records: list[dict[str, Any]] | None = None
    name: str | None = None
    split: str = "train"
    subset: str | None = None
    offset: int = 0
    num_rows: int | None = None
    num_samples: int | None = None
    sample_rate: float | None = None
    repeat: float = 1.0
    weight: float | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if (self.path is None) == (self.records is None):
            raise ConfigError(f"{self!r}: give either 'path' or 'records'.")
        if self.num_samples is not None and self.sample_rate is not None:
            raise ConfigError(f"source {self.title}: give 'num_samples' or 'sample_rate', not both.")
        if self.weight is not None and self.repeat != 1.0:
            raise ConfigError(f"source {self.title}: give 'weight' or 'repeat', not both.")
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise ConfigError(f"source {self.title}: sample_rate is {self.sample_rate}; use a number in (0, 1].")
        if not 0 < self.repeat <= MOST_REPEATS or (self.weight is not None and self.weight <= 0):
            raise ConfigError(
                f"source {self.title}: 'repeat' and 'weight' must be above 0, 'repeat' at most {MOST_REPEATS}."
            )
        if min(self.offset, self.num_rows or 0, self.num_samples or 0) < 0:
            raise ConfigError(f"source {self.title}: 'offset', 'num_rows' and 'num_samples' must be 0 or more.")

    @property
    def title(self) -> str:
        """The name in reports and predictions."""
        return self.name or (Path(self.path).stem if self.path else "records")

    def files(self) -> list[Path]:
        """The local files behind `path`; none for inline records and hub names.

        Raises:
            FileNotFoundError: If `path` looks like a file and is not there.
        """
        if self.path is None:
            return []
        path = Path(self.path).expanduser()
        if path.is_dir():
            saved = (path / "state.json").is_file()  # its JSON files describe the data
            kinds = (".arrow",) if saved else tuple(READERS)
            files = sorted(f for f in path.iterdir() if f.suffix in kinds and not f.name.startswith("cache-"))
            if not files:
                raise ConfigError(f"{path}: no {', '.join(READERS)} file in this folder.")
            return files
        if path.is_file():
            return [path]
        if path.suffix or self.path.count("/") != 1:
            raise FileNotFoundError(
                f"{path}: no such file (source '{self.title}', looked from {Path.cwd()}). Check data's 'path'."
            )
        return []

    def read(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, raw record) for each record in order."""
        if self.records is not None:
            yield from ((f"{self.title}[{index}]", record) for index, record in enumerate(self.records))
            return
        files = self.files()
        if not files:
            yield from self._read_hub()
        for file in files:
            reader = READERS.get(file.suffix)
            if reader is None:
                raise ConfigError(f"{file}: unknown file type '{file.suffix}'. Use {', '.join(READERS)}.")
            yield from reader(file)

    def _read_hub(self) -> Iterator[tuple[str, Any]]:
        import datasets

        reason = look_for_hub()
        try:
            rows = datasets.load_dataset(self.path, self.subset, split=self.split)
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            if reason:
                raise ConfigError(
                    f"{self.path}: no file or folder (looked from {Path.cwd()}), not in the cache, and {reason}. Check "
                    "data's 'path', or set HF_ENDPOINT to a mirror."
                ) from error
            raise ConfigError(
                f"{self.path}: neither a local file nor a data set that the hub gives "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Check data's 'path'."
            ) from error
        for index, row in enumerate(rows):
            yield f"{self.path}[{index}]", without_nulls(row)


def without_nulls(value: Any) -> Any:
    """A value of a table without its nulls, at any depth.

    A table gives each row all keys that any row has, such as those of other rows' tool arguments.
    """
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise RecordError(
                        where,
                        "",
                        f"not valid JSON ({error.msg} at column {error.colno})",
                        "Write one JSON object a line.",
                    ) from error
                yield where, record
        except UnicodeDecodeError as error:
            raise RecordError(
                str(path), "", f"not UTF-8 text (byte {error.start})", "Save the file as UTF-8."
            ) from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}:{error.lineno}", "", f"not valid JSON ({error.msg})", "Write a list of records, or use .jsonl."
        ) from error
    except UnicodeDecodeError as error:
        raise RecordError(str(path), "", f"not UTF-8 text (byte {error.start})", "Save the file as UTF-8.") from error
    if not isinstance(records, list):
        raise RecordError(str(path), "", "the file does not hold a list", "Write a list of records, or use .jsonl.")
    yield from ((f"{path}[{index}]", record) for index, record in enumerate(records))


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise RecordError(str(path), "", f"not a Parquet file ({error})", "Check the file.") from error
    index = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            yield f"{path}[{index}]", without_nulls(row)
            index += 1


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets
    import pyarrow

    try:
        rows = datasets.Dataset.from_file(str(path))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RecordError(str(path), "", f"not an Arrow file ({error})", "Check the file.") from error
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", without_nulls(row)


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}
