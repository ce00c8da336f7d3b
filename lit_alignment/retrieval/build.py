"""An index in the making: every process writes the embeddings of its own passages into common files."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_alignment.data.passages import Passage
from lit_alignment.data.sources.content import file_hash
from lit_alignment.errors import CheckpointError, ConfigError, require
from lit_alignment.retrieval.files import (
    PASSAGES,
    Manifest,
    create_shards,
    map_shards,
    shard_plan,
    write_manifest,
    write_passages,
)
from lit_alignment.retrieval.index import FAISS_FILE, IndexConfig, make_faiss


class IndexBuilder:
    """Writes an index into a folder beside the final one, which takes its place when it is whole.

    Args:
        config: What to build, and where.
        manifest: What it is made of; shards and search are filled in here.
    """

    def __init__(self, config: IndexConfig, manifest: Manifest) -> None:
        """Plan the files."""
        shards = shard_plan(manifest.count, config.rows_per_shard)
        self.config = config
        self.manifest = Manifest(**(vars(manifest) | {"shards": shards, "search": config.search}))
        self.target = Path(config.path).expanduser()
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self._shards: list[Tensor] | None = None

    def create(self, passages: Iterable[Passage]) -> None:
        """Write the passages, read once, and room for their embeddings: on one process, before any writes.

        Raises:
            ConfigError: If two have one id.
            CheckpointError: If the disk is full or the folder cannot be written.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            write_passages(self.folder, _of_different_ids(passages))
            create_shards(self.folder, self.manifest.shards, self.manifest.dimension, self.manifest.dtype)
        except ConfigError:
            shutil.rmtree(self.folder)
            raise
        except OSError as error:
            raise CheckpointError(f"{self.target}: cannot write the index ({error}).") from error

    def write(self, positions: Sequence[int], embeddings: Tensor) -> None:
        """Put embeddings, [B, D], at their positions among all passages."""
        if self._shards is None:
            self._shards = map_shards(self.folder, self.manifest, writable=True)
        wanted = torch.tensor(positions)
        start = 0
        for shard in self._shards:
            inside = (wanted >= start) & (wanted < start + len(shard))
            shard[wanted[inside] - start] = embeddings.cpu()[inside].to(shard.dtype)
            start += len(shard)

    def finish(self) -> Path:
        """Add the FAISS index, if one is asked for, and the manifest, and take the final name: on one process.

        Raises:
            CheckpointError: If the disk is full or the folder cannot be written.
        """
        shards = map_shards(self.folder, self.manifest)
        searcher = self.config.search
        if searcher != "exact":
            index = make_faiss(shards, self.config)
            require("faiss", "rag").write_index(index, str(self.folder / FAISS_FILE))
        try:
            made = [name for name, _ in self.manifest.shards] + [PASSAGES] + [FAISS_FILE] * (searcher != "exact")
            checksums = {name: file_hash(self.folder / name) for name in made}
            write_manifest(self.folder, replace(self.manifest, checksums=checksums))
            if self.target.exists():
                old = self.target.with_name(f".{self.target.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.target, old)
                os.replace(self.folder, self.target)
                shutil.rmtree(old)
            else:
                os.replace(self.folder, self.target)
        except OSError as error:
            raise CheckpointError(f"{self.target}: cannot write the index ({error}).") from error
        return self.target


def _of_different_ids(passages: Iterable[Passage]) -> Iterator[Passage]:
    """The same passages, as long as no id comes twice."""
    known: set[str] = set()
    for passage in passages:
        if passage.id in known:
            raise ConfigError(
                f"index.passages: the id '{passage.id}' is that of two passages, from two sources. Give each passage "
                "its own (one without has its line's number), or each source of text files a 'name' of its own."
            )
        known.add(passage.id)
        yield passage
