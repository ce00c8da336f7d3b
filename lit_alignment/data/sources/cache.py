"""Encoded data on disk: written once under a fingerprint, memory-mapped by every process."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from lit_alignment.data.sources.records import SourceConfig


def fingerprint(*parts: Any) -> str:
    """A hash of settings; equal parts give equal hashes in every process and on every day."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def source_fingerprint(source: SourceConfig) -> list[Any]:
    """What a source's records depend on: for files their size and time of change, else what names them."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files()]
    return files or [source.path, source.subset, source.split, source.records]


def files_fingerprint(files: Iterable[Path]) -> str:
    """A hash of the names and contents of files, wherever they are."""
    return fingerprint(sorted((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files))


def cached_dataset(
    path: Path, rows: Callable[[], Iterator[dict[str, Any]]], features: datasets.Features
) -> datasets.Dataset:
    """The data set at `path`, written from `rows` if it is not there; half a file never carries the name."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            with ArrowWriter(path=str(partial), features=features) as writer:
                for row in rows():
                    writer.write(row)
                num_rows, _ = writer.finalize()
            if num_rows:
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if not num_rows:
            return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return datasets.Dataset.from_file(str(path))
