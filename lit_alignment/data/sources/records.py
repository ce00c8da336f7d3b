"""Read records from files, the hub, or the config itself, with the place of each."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from lit_alignment.data.sources.values import LIMITS, Misfit, RecordLimitsConfig, parse_json, plain
from lit_alignment.errors import AlignmentError, ConfigError, RecordError
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
        split: Split of a hub data set (`train` by default), or of a folder with several.
        subset: Configuration name of a hub data set.
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

    @property
    def title(self) -> str:
        """The name in reports and predictions."""
        return self.name or (Path(self.path).stem if self.path else "records")

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
            saved = (path / "state.json").is_file()  # its JSON files describe the data
            kinds = (".arrow",) if saved else tuple(READERS)
            files = sorted(f for f in path.iterdir() if f.suffix in kinds and not f.name.startswith("cache-"))
            files = [file for file in files if file.is_file()]
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

    def read(self) -> Iterator[tuple[str, Any]]:
        """Yield (where, raw record) for each record in order.

        Raises:
            RecordError: If a file cannot be read, or a record is beyond the limits.
        """
        if self.records is not None:
            yield from _plain_records(enumerate_as(self.title, self.records), self.limits)
            return
        files = self.files()
        if not files:
            yield from _plain_records(self._read_hub(), self.limits, table=True)
        for file in files:
            yield from read_file(file, self.limits)

    def _read_hub(self) -> Iterator[tuple[str, Any]]:
        import datasets

        reason = look_for_hub()
        try:
            rows = datasets.load_dataset(self.path, self.subset, split=self.split or "train")
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
        return _rows(str(self.path), rows.with_format("arrow").iter(256))


def read_file(path: Path, limits: RecordLimitsConfig = LIMITS, suffix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (where, raw record) for each record of a file, in the types of JSON.

    Args:
        path: A .jsonl, .json, .parquet or .arrow file.
        limits: What a record may hold at most.
        suffix: Its kind, if that is known whatever its name.

    Raises:
        ConfigError: If it is of another kind.
        RecordError: If it cannot be read, or a record is beyond the limits.
    """
    suffix = suffix or path.suffix
    reader = READERS.get(suffix)
    if reader is None:
        packed = " Unpack it first." if suffix in (".gz", ".bz2", ".xz", ".zst", ".zip") else ""
        raise ConfigError(f"{path}: unknown file type '{suffix}'. Use {', '.join(READERS)}.{packed}")
    try:
        records = reader(path, limits)
        if suffix != ".jsonl":  # whose lines come as plain values
            records = _plain_records(records, limits, table=suffix != ".json")
        yield from records
    except UnicodeDecodeError as error:
        raise RecordError(_undecodable(path), "", "not UTF-8 text", "Save the file as UTF-8.") from error
    except OSError as error:
        raise RecordError(str(path), "", f"cannot be read ({error.strerror or error})", "Check the file.") from error


def _undecodable(path: Path) -> str:
    """File and line of the first bytes that are no UTF-8 text."""
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):  # noqa: B007 - a text across lines is none either
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return f"{path}:{number}"


def _plain_records(
    records: Iterable[tuple[str, Any]], limits: RecordLimitsConfig, table: bool = False
) -> Iterator[tuple[str, Any]]:
    for where, record in records:
        try:
            value = plain(record, limits, table)
        except Misfit as misfit:
            raise misfit.at(where) from misfit
        yield where, value


def enumerate_as(name: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(where, record) of records that are not lines."""
    return ((f"{name}[{index}]", record) for index, record in enumerate(records))


def _read_jsonl(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(limits.length + 1), ""), start=1):
            where = f"{path}:{number}"
            if len(line) > limits.length:
                fix = "Write one JSON object a line, or raise limits.length of the source."
                raise RecordError(where, "", f"the line has more than {limits.length} characters", fix)
            if not line.strip():
                continue
            try:
                record = parse_json(line.rstrip(), limits)
            except json.JSONDecodeError as error:
                problem = f"not valid JSON ({error.msg} at column {error.colno})"
                raise RecordError(where, "", problem, "Write one JSON object a line.") from error
            except Misfit as misfit:
                raise misfit.at(where) from misfit
            yield where, record


def _read_json(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    fix = "Write a list of records, or use .jsonl."
    try:
        records = parse_json(path.read_text(encoding="utf-8-sig"), limits, check=False)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{error.lineno}", "", f"not valid JSON ({error.msg})", fix) from error
    except Misfit as misfit:
        raise misfit.at(str(path)) from misfit
    if not isinstance(records, list):
        raise RecordError(str(path), "", "the file does not hold a list", fix)
    return enumerate_as(str(path), records)


def _read_parquet(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(str(path), "", f"not a Parquet file ({error})", "Check the file.") from error
    return _rows(str(path), file.iter_batches(256))


def _read_arrow(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    import pyarrow

    try:
        batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(str(path), "", f"not an Arrow file ({error})", "Check the file.") from error
    return _rows(str(path), batches)


def _rows(name: str, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The rows of Arrow tables, of which a damaged one may show only as it is decoded."""
    import pyarrow

    index = 0
    try:
        for batch in batches:
            batch.validate(full=True)
            for row in batch.to_pylist():
                yield f"{name}[{index}]", row
                index += 1
    except AlignmentError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise RecordError(
            f"{name}[{index}]", "", f"this row or one behind it cannot be decoded ({error})", "Write the file again."
        ) from error


READERS: dict[str, Callable[[Path, RecordLimitsConfig], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
