"""Read the records of one file, with the place of each."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from lit_alignment.data.sources.values import LIMITS, Misfit, RecordLimitsConfig, parse_json, plain
from lit_alignment.errors import AlignmentError, ConfigError, RecordError

LINES = (".jsonl", ".csv", ".tsv")  # kinds that are read line by line, so that they may be compressed
CODECS = {".gz": "gzip", ".zst": "zstd"}


def kind_of(path: Path) -> str:
    """The kind of a file by its name: `.jsonl` of `a.jsonl.gz`, too; any other end as it is."""
    inner = path.with_suffix("").suffix if path.suffix in CODECS else ""
    return inner if inner in LINES else path.suffix


def read_file(path: Path, limits: RecordLimitsConfig = LIMITS, suffix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (where, raw record) for each record of a file, in the types of JSON.

    Args:
        path: A .jsonl, .json, .csv, .tsv, .parquet or .arrow file; one of lines may be compressed (.gz, .zst).
        limits: What a record may hold at most.
        suffix: Its kind, if that is known whatever its name.

    Raises:
        ConfigError: If it is of another kind.
        RecordError: If it cannot be read, or a record is beyond the limits.
    """
    suffix = suffix or kind_of(path)
    reader = READERS.get(suffix)
    if reader is None:
        packed = ""
        if suffix in (*CODECS, ".bz2", ".xz", ".zip"):
            packed = f" Unpack it first; {', '.join(LINES)} may end with {' or '.join(CODECS)}."
        raise ConfigError(f"{path}: unknown file type '{suffix}'. Use {', '.join(READERS)}.{packed}")
    with readable(path):
        records = reader(path, limits)
        if suffix != ".jsonl":  # whose lines come as plain values
            records = plain_records(records, limits, table=suffix != ".json")
        yield from records


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in one message that a file is no text, or cannot be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise RecordError(_undecodable(path), "", "not UTF-8 text", _conversion(path)) from error
    except OSError as error:
        raise RecordError(str(path), "", f"cannot be read ({error.strerror or error})", "Check the file.") from error


def text_lines(path: Path, limits: RecordLimitsConfig = LIMITS) -> Iterator[str]:
    """The lines of a file of text, with their ends.

    Args:
        path: Of UTF-8 text.
        limits: Of which `length` is that of a line.

    Raises:
        RecordError: If it is no such text, cannot be read, or has a line beyond the limit.
    """
    with readable(path), _opened(path) as file:
        yield from _lines(path, file, limits)


def header_of(path: Path, limits: RecordLimitsConfig = LIMITS) -> list[str] | None:
    """Names of a table's columns; None of a file whose records each have their own.

    Args:
        path: Of any kind that is read.
        limits: What a record may hold at most.

    Raises:
        RecordError: If it cannot be read.
    """
    match kind_of(path):
        case ".csv" | ".tsv":
            with readable(path), _opened(path, newline="") as file:
                return next(_csv_rows(path, file, limits), ("", []))[1]
        case ".parquet":
            return list(_parquet(path).schema_arrow.names)
        case ".arrow":
            return list(_arrow(path).schema.names)
    return None


def plain_records(
    records: Iterable[tuple[str, Any]], limits: RecordLimitsConfig, table: bool = False
) -> Iterator[tuple[str, Any]]:
    """The same records in the types of JSON.

    Args:
        records: With their places.
        limits: What a record may hold at most.
        table: Leave out nulls.

    Raises:
        RecordError: If there is no such value, or it is beyond the limits.
    """
    for where, record in records:
        try:
            value = plain(record, limits, table)
        except Misfit as misfit:
            raise misfit.at(where) from misfit
        yield where, value


def enumerate_as(name: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(where, record) of records that are not lines."""
    return ((f"{name}[{index}]", record) for index, record in enumerate(records))


def table_rows(name: str, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
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


def _opened(path: Path, encoding: str = "utf-8-sig", newline: str | None = None) -> TextIO:
    """A file as text, unpacked as it is read."""
    if path.suffix not in CODECS:
        return path.open(encoding=encoding, newline=newline)
    import pyarrow

    packed = pyarrow.PythonFile(path.open("rb"))
    return io.TextIOWrapper(pyarrow.CompressedInputStream(packed, CODECS[path.suffix]), encoding, newline=newline)


def _lines(path: Path, file: TextIO, limits: RecordLimitsConfig) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(limits.length + 1), ""), start=1):
        if len(line) > limits.length:
            fix = "Write one record a line, or raise limits.length of the source."
            raise RecordError(f"{path}:{number}", "", f"the line has more than {limits.length} characters", fix)
        yield line


def _undecodable(path: Path) -> str:
    """File and line of the first bytes that are no UTF-8 text."""
    number = 0
    with _opened(path, encoding="latin-1", newline="\n") as file:
        for number, line in enumerate(file, start=1):  # noqa: B007 - a text across lines is none either
            try:
                line.encode("latin-1").decode()
            except UnicodeDecodeError:
                break
    return f"{path}:{number}"


def _conversion(path: Path) -> str:
    """How to make UTF-8 of a file, which Windows programs write in one of two other encodings."""
    if path.suffix in CODECS:
        return "Save the file as UTF-8."
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
    command = f"iconv -f {encoding} -t utf-8 {quote(str(path))} > NEW{path.suffix}"
    return f"Save the file as UTF-8; one from Windows by: {command}"


def _read_jsonl(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(_lines(path, file, limits), start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = parse_json(line.rstrip(), limits)
            except json.JSONDecodeError as error:
                problem = f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
                raise RecordError(where, "", problem, "Write one JSON object a line.") from error
            except Misfit as misfit:
                raise misfit.at(where) from misfit
            yield where, record


def _read_json(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    fix = "Write a list of records, or use .jsonl."
    try:
        records = parse_json(path.read_text(encoding="utf-8-sig"), limits, check=False)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
        raise RecordError(f"{path}:{error.lineno}", "", problem, fix) from error
    except Misfit as misfit:
        raise misfit.at(str(path)) from misfit
    if not isinstance(records, list):
        raise RecordError(str(path), "", "the file does not hold a list", fix)
    return enumerate_as(str(path), records)


def _read_csv(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    """The rows behind the header as texts by column; empty cells are left out, as nulls are in other tables."""
    with _opened(path, newline="") as file:
        rows = _csv_rows(path, file, limits)
        where, header = next(rows, ("", []))
        twice = next((name for name in header if name and header.count(name) > 1), None)
        if twice is not None:
            raise RecordError(where, "", f"two columns are named '{twice}'", "Give each a name of its own.")
        for where, cells in rows:
            if len(cells) != len(header):
                problem = f"the row has {len(cells)} cells, and the header {len(header)}"
                fix = "Quote cells that hold line breaks or what separates them, and give each row all its cells."
                raise RecordError(where, "", problem, fix)
            yield where, {name: cell for name, cell in zip(header, cells, strict=True) if name and cell.strip()}


def _csv_rows(path: Path, file: TextIO, limits: RecordLimitsConfig) -> Iterator[tuple[str, list[str]]]:
    """Each row with its file and first line; empty lines are none."""
    csv.field_size_limit(limits.length)
    rows = csv.reader(_lines(path, file, limits), delimiter=_delimiter(path), strict=True)
    begin = 1
    try:
        for cells in rows:
            where, begin = f"{path}:{begin}", rows.line_num + 1
            if cells:
                yield where, cells
    except csv.Error as error:
        fix = 'Close quotes, and write a quote inside of quotes twice ("").'
        raise RecordError(f"{path}:{begin}", "", f"not a row of a table ({error})", fix) from error


def _delimiter(path: Path) -> str:
    """What separates the cells of a table: a semicolon where its first line has no comma, as spreadsheets write it."""
    if kind_of(path) == ".tsv":
        return "\t"
    with _opened(path) as file:
        first = file.readline(LIMITS.length)
    return ";" if ";" in first and "," not in first else ","


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(str(path), "", f"not a Parquet file ({error})", "Check the file.") from error


def _read_parquet(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    return table_rows(str(path), _parquet(path).iter_batches(256))


def _arrow(path: Path) -> Any:
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(str(path), "", f"not an Arrow file ({error})", "Check the file.") from error


def _read_arrow(path: Path, limits: RecordLimitsConfig) -> Iterator[tuple[str, Any]]:
    return table_rows(str(path), _arrow(path))


READERS: dict[str, Callable[[Path, RecordLimitsConfig], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
