"""Rows in an Arrow stream whose record batches have checksums, compared when a batch is first read.

Behind the stream stands the checksum of each column of each batch (uint64, [batches, columns]), and at the end FOOTER:
the checksums of these and of the stream's headers, the numbers of batches and columns, its own checksum, and MAGIC.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from lit_alignment.errors import CacheError

FOOTER = struct.Struct("<QQQQQ8s")
MAGIC = b"LITCACHE"
ROWS, BYTES = 1000, 4 << 20  # of a record batch at most: the first of its rows that is read waits for all of them


def write_rows(
    path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, writing: Callable[[], AbstractContextManager[None]]
) -> int:
    """Write rows and their checksums, and say how many they are.

    Args:
        path: The file.
        rows: The rows.
        schema: Their columns.
        writing: Surrounds what is done to the file; what goes wrong in reading the rows is not the file's fault.
    """
    number = 0
    with writing():
        sink = pa.OSFile(str(path), "wb")
    with sink:
        with writing():
            writer = pa.ipc.new_stream(sink, schema)
        while block := list(islice(rows, ROWS)):
            number += len(block)
            batch = pa.RecordBatch.from_pylist(block, schema=schema)
            size = -(-len(block) // max(1, -(-batch.nbytes // BYTES)))
            with writing():
                for start in range(0, len(block), size):
                    writer.write_batch(batch.slice(start, size))
        with writing():
            writer.close()
    with writing():
        headers = xxhash.xxh3_64()
        with pa.OSFile(str(path)) as source:  # not mapped: it would all count as this process's memory
            sums = [[_checksum(column) for column in batch.columns] for batch in _batches(source, headers)]
        with path.open("ab") as file:
            data = np.array(sums, "<u8").tobytes()
            ends = xxhash.xxh3_64_intdigest(data), headers.intdigest(), len(sums), len(schema)
            file.write(data + FOOTER.pack(*ends, _own(ends), MAGIC))
    return number


class CachedFile:
    """A file of `write_rows`, mapped into memory; a batch is compared with its checksums when it is first read.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers, and nothing else.

        Raises:
            CacheError: If they are damaged.
        """
        self.path = path
        self._sums, expected = _checksums(path)
        headers = xxhash.xxh3_64()
        try:
            with pa.memory_map(str(path)) as source:
                self.batches = list(_batches(source, headers))
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, str(error)) from error
        if headers.intdigest() != expected:
            raise _damaged(path, "its headers have another checksum")
        # Shared with the processes that are forked, and by them with this one: none compares what another has.
        self._compared = np.frombuffer(mmap.mmap(-1, max(1, len(self.batches))), bool)

    def __reduce__(self) -> tuple[type["CachedFile"], tuple[Path]]:
        """Map the file again in a process that is not forked."""
        return CachedFile, (self.path,)

    def batch(self, number: int) -> pa.RecordBatch:
        """A batch.

        Raises:
            CacheError: If it is damaged.
        """
        if not self._compared[number]:
            self._compare(number, self.batches[number].schema.names)
            self._compared[number] = True
        return self.batches[number]

    def columns(self, *names: str) -> pa.Table:
        """All of some columns; nothing else is read.

        Raises:
            CacheError: If one is damaged.
        """
        for number in range(len(self.batches)):
            self._compare(number, names)
        return pa.Table.from_batches(self.batches).select(names)

    def _compare(self, number: int, names: Iterable[str]) -> None:
        batch = self.batches[number]
        for name in names:
            column = batch.schema.get_field_index(name)
            if _checksum(batch.column(column)) != self._sums[number, column]:
                raise _damaged(self.path, f"the column '{name}' has another checksum")


class IndexedRows(Protocol):
    """Rows that are asked for by index."""

    def __len__(self) -> int:
        """Number of rows."""

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at some indices."""


@dataclass
class CachedRows:
    """Rows of files in any order.

    Args:
        schema: Their columns.
        files: The files, one behind the other.
        positions: Which rows, by their position in all files together.
    """

    schema: pa.Schema
    files: list[CachedFile]
    positions: NDArray[np.int64]

    @cached_property
    def _batches(self) -> tuple[list[tuple[CachedFile, int]], NDArray[np.int64]]:
        """Each batch's file and number there, and the position of its first row."""
        batches = [(file, number) for file in self.files for number in range(len(file.batches))]
        return batches, np.cumsum([0, *(len(batch) for file in self.files for batch in file.batches)])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows in order."""
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    def __getitem__(self, key: int | str) -> dict[str, Any] | list[Any]:
        """One row, or the values of a column."""
        return self.column(key).to_pylist() if isinstance(key, str) else self.rows([key])[0]

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at some indices.

        Raises:
            CacheError: If a batch is damaged.
        """
        batches, starts = self._batches
        positions = self.positions[np.asarray(indices, np.int64)]
        numbers = np.searchsorted(starts, positions, side="right") - 1
        found = zip(numbers.tolist(), (positions - starts[numbers]).tolist(), strict=True)
        slices = [batches[number][0].batch(batches[number][1]).slice(offset, 1) for number, offset in found]
        rows: list[dict[str, Any]] = pa.Table.from_batches(slices, self.schema).to_pylist()
        return rows

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, of which nothing else is read.

        Raises:
            CacheError: If it is damaged.
        """
        chunks = [chunk for file in self.files for chunk in file.columns(name).column(0).chunks]
        return pa.chunked_array(chunks, self.schema.field(name).type).take(pa.array(self.positions))


def joined(parts: Sequence[CachedRows]) -> CachedRows:
    """The rows of one after the other."""
    files: list[CachedFile] = []
    positions = []
    for part in parts:
        positions.append(part.positions + sum(len(batch) for file in files for batch in file.batches))
        files += part.files
    return CachedRows(parts[0].schema, files, np.concatenate(positions))


def _batches(source: pa.NativeFile, headers: xxhash.xxh3_64) -> Iterator[pa.RecordBatch]:
    """The batches of a stream; what is not in them goes into the checksum of the headers."""
    schema = None
    for message in pa.ipc.MessageReader.open_stream(source):
        headers.update(message.metadata)
        if message.type == "schema":
            schema = pa.ipc.read_schema(message)
        else:
            yield pa.ipc.read_record_batch(message, schema)


def _checksum(values: pa.Array) -> int:
    digest = xxhash.xxh3_64()
    for buffer in values.buffers():
        if buffer is not None:
            digest.update(buffer)
    return int(digest.intdigest())


def _own(ends: Sequence[int]) -> int:
    return int(xxhash.xxh3_64_intdigest(struct.pack("<QQQQ", *ends)))


def _checksums(path: Path) -> tuple[NDArray[np.uint64], int]:
    """The checksums of a file's columns, [batches, columns], and that of its headers.

    Raises:
        CacheError: If they are not there, or damaged themselves.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - FOOTER.size))
        end = file.read()
        if len(end) < FOOTER.size or not end.endswith(MAGIC):
            raise _damaged(path, "its end is missing")
        *ends, own, _ = FOOTER.unpack(end)
        expected, headers, batches, columns = ends
        if own == _own(ends):
            file.seek(size - FOOTER.size - 8 * batches * columns)
            sums = file.read(8 * batches * columns)
    if own != _own(ends) or xxhash.xxh3_64_intdigest(sums) != expected:
        raise _damaged(path, "its end has another checksum")
    return np.frombuffer(sums, "<u8").reshape(batches, columns), headers


def _damaged(path: Path, why: str) -> CacheError:
    """What to say of a damaged file, which is deleted."""
    try:
        path.unlink(missing_ok=True)
        fate = "They were deleted, and are made again at the next start (fit resumes with --ckpt_path newest)"
    except OSError as error:
        fate = f"They cannot be deleted ({error.strerror}): delete them, to have them made again at the next start"
    return CacheError(f"{path}: the cached data are damaged ({why}). {fate}.")
