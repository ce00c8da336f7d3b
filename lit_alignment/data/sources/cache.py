"""Encoded data on disk: written once under a fingerprint, memory-mapped by every process."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from lit_alignment.data.sources.content import content_hash
from lit_alignment.data.sources.record_batches import CachedFile, CachedRows, write_rows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import CacheError, writing

logger = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """A hash of settings; equal parts give equal hashes in every process and on every day."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def source_fingerprint(source: SourceConfig, folder: Path) -> list[Any]:
    """What a source's records depend on: for files what they hold, else what names them.

    Args:
        source: The source.
        folder: Of the cache, where it is remembered what files hold.
    """
    files = [(str(file.resolve()), content_hash(file, folder)) for file in source.files()]
    return files or [source.path, source.subset, source.split, source.records]


def files_fingerprint(files: Iterable[Path]) -> str:
    """A hash of the names and contents of files, wherever they are."""
    return fingerprint(sorted((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files))


def cached_rows(
    path: Path, rows: Callable[[], Iterator[dict[str, Any]]], features: datasets.Features, at_once: Sequence[str]
) -> CachedRows:
    """The rows at `path`, written from `rows` if it is not there or damaged; half a file never carries the name.

    Args:
        path: The file.
        rows: Gives the rows.
        features: Their columns.
        at_once: Columns to compare with their checksums now.

    Raises:
        CacheError: If the disk is full or the folder cannot be written.
    """
    schema = features.arrow_schema
    if path.exists():
        try:
            file = CachedFile(path)
            file.columns(*at_once)
            return _all(schema, [file])
        except CacheError as error:
            logger.warning("%s Making them again now.", error)
    unfinished = path.with_suffix(f".partial-{uuid.uuid4().hex}")  # hosts that share the folder may share pids, too
    fix = "Free its disk, or set data.cache_dir (or LIT_ALIGNMENT_CACHE) to a folder with room that can be written"
    on_disk = partial(writing, path, CacheError, fix)
    try:
        with on_disk():
            path.parent.mkdir(parents=True, exist_ok=True)
        if not write_rows(unfinished, rows(), schema, on_disk):
            return _all(schema, [])
        with on_disk():
            os.replace(unfinished, path)
    finally:
        if unfinished.exists():
            unfinished.unlink()
    return _all(schema, [CachedFile(path)])


def _all(schema: pa.Schema, files: list[CachedFile]) -> CachedRows:
    return CachedRows(schema, files, np.arange(sum(len(batch) for file in files for batch in file.batches)))
