"""An index on disk: a manifest, the passages, and their embeddings in shards that are mapped into memory.

N passages, D width
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from lit_alignment.data.passages import Passage
from lit_alignment.data.sources.content import file_hash
from lit_alignment.errors import ConfigError
from lit_alignment.files import config_in, inside

FORMAT = 1
MANIFEST = "manifest.json"
PASSAGES = "passages.arrow"
PASSAGE_FEATURES = datasets.Features({name: datasets.Value("string") for name in ("id", "title", "text")})
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Manifest:
    """What an index was made of.

    Args:
        encoder: Settings of the passage encoder that decide its embeddings.
        encoder_hash: Hash of its weights.
        dimension: D.
        dtype: Of the stored embeddings.
        count: N.
        shards: File name and number of rows of each shard, in order.
        search: `exact`, or the kind of the FAISS index beside the embeddings.
        step: Optimizer step at which the embeddings were made, in a training run.
        checksums: Hash of each file.
        format: Version of this layout.
    """

    encoder: dict[str, Any]
    encoder_hash: str
    dimension: int
    dtype: Literal["float32", "bfloat16", "float16"]
    count: int
    shards: list[list[Any]] = field(default_factory=list)
    search: str = "exact"
    step: int = 0
    checksums: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def made_of(self) -> dict[str, Any]:
        """What decides what is found."""
        return {"index": self.encoder_hash, "index_files": self.checksums}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index.

    Raises:
        FileNotFoundError: If there is no index.
        ConfigError: If it is no JSON, or of another version.
        CheckpointError: If it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no index here (no {MANIFEST}; looked from {Path.cwd()}). "
            "Make it: lit-alignment index build --config FILE."
        )
    manifest = config_in(path, Manifest, "a manifest of an index")
    if manifest.format != FORMAT:
        raise ConfigError(f"{path}: format {manifest.format} is not {FORMAT}. Build the index again.")
    return manifest


class FileChecks:
    """Compares a file of an index with its checksum when it is first read.

    Args:
        folder: The index.
        checksums: Hash of each file; earlier versions have written none.
    """

    def __init__(self, folder: Path, checksums: dict[str, str]) -> None:
        """Nothing has been read."""
        self.folder, self._waiting = folder, dict(checksums)

    def __call__(self, name: str) -> None:
        """Compare a file, once.

        Raises:
            ConfigError: If it is damaged.
        """
        expected = self._waiting.pop(name, None)
        if expected is not None and file_hash(self.folder / name) != expected:
            raise ConfigError(f"{self.folder / name}: damaged (it has another checksum). Build the index again.")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest last: a folder without one is no index."""
    fresh = folder / f".{MANIFEST}.new"
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, folder / MANIFEST)


def write_passages(folder: Path, passages: Iterable[Passage]) -> None:
    """Write ids, titles and texts, in the order of the embeddings."""
    with ArrowWriter(path=str(folder / PASSAGES), features=PASSAGE_FEATURES) as writer:
        for passage in passages:
            writer.write({"id": passage.id, "title": passage.title, "text": passage.text})
        writer.finalize()


def shard_plan(count: int, rows_per_shard: int) -> list[list[Any]]:
    """File name and number of rows of each shard."""
    number = max(1, -(-count // rows_per_shard))
    sizes = [min(rows_per_shard, count - start) for start in range(0, count, rows_per_shard)] or [0]
    return [[f"embeddings-{i + 1:05d}-of-{number:05d}.safetensors", size] for i, size in enumerate(sizes)]


def create_shards(folder: Path, shards: Sequence[Sequence[Any]], dimension: int, dtype: str) -> None:
    """Write empty shards at their full size, so that every process can fill in its own rows."""
    width = DTYPES[dtype].itemsize
    for name, rows in shards:
        size = rows * dimension * width
        entry = {"dtype": SAFETENSORS_NAMES[dtype], "shape": [rows, dimension], "data_offsets": [0, size]}
        header = json.dumps({"embeddings": entry}).encode()
        header += b" " * (-(8 + len(header)) % 64)  # data that begin on a cache line
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)


def map_shards(folder: Path, manifest: Manifest, writable: bool = False) -> list[Tensor]:
    """The embeddings of each shard, [n, D], mapped from its file.

    Raises:
        ConfigError: If a shard is missing or not as the manifest says.
    """
    dtype = DTYPES[manifest.dtype]
    mapped = []
    for shard in manifest.shards:
        try:
            name, rows = shard
            path = inside(folder, name)
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                shape = json.loads(file.read(length))["embeddings"]["shape"]
            expected = 8 + length + rows * manifest.dimension * dtype.itemsize
            if shape != [rows, manifest.dimension] or path.stat().st_size != expected:
                raise ValueError(f"it holds {shape}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = f"of {manifest.dimension} numbers a row that the manifest names as {shard}"
            raise ConfigError(f"{folder}: not the embeddings {wanted} ({error}). Build the index again.") from error
        if rows == 0:
            mapped.append(torch.empty(0, manifest.dimension, dtype=dtype))
            continue
        # NumPy maps files but knows no bfloat16, so the bits are read as integers.
        integers = np.dtype(f"<i{dtype.itemsize}")
        # Copy on write where nothing is to be written: torch wants memory that it may write to.
        shape = (rows, manifest.dimension)
        raw = np.memmap(path, integers, "r+" if writable else "c", offset=8 + length, shape=shape)
        mapped.append(torch.from_numpy(raw).view(dtype))
    return mapped
