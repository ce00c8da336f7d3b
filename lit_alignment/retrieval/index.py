"""Search in an index, and the passages behind what was found.

B queries, N passages, D width, K passages of a query
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from lit_alignment.data.passages import Passage, PassageSourceConfig
from lit_alignment.errors import ConfigError, require
from lit_alignment.retrieval.files import PASSAGE_FEATURES, PASSAGES, FileChecks, Manifest, map_shards, read_manifest
from lit_alignment.retrieval.search import exact_search, sharded_search

SearchKind = Literal["exact", "flat", "ivf", "hnsw"]
FAISS_FILE = "index.faiss"


@dataclass(frozen=True)
class IndexConfig:
    """Where an index is, and how it is made.

    Args:
        path: Its folder.
        passages: Where its passages come from, records or folders of text; only needed to build it.
        search: `exact` compares a query with every passage; FAISS's `flat` does too, `ivf` looks into some clusters
            only, and `hnsw` walks a graph (both for many millions).
        dtype: Precision of the stored embeddings.
        rows_per_shard: Passages in one file of embeddings.
        batch_size: Passages to encode together.
        num_clusters: Clusters of `ivf`; by default 4 times the square root of the number of passages.
        num_probes: Clusters that a search in `ivf` looks into.
        num_neighbors: Links of each passage in `hnsw`.
        sharded: In training, validation and test, each process keeps a part of the embeddings on its own device and
            compares the queries of all processes with it; for indexes that one device, or one host, cannot hold.
    """

    path: str
    passages: list[PassageSourceConfig] | None = None
    search: SearchKind = "exact"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    rows_per_shard: int = 1_000_000
    batch_size: int = 64
    num_clusters: int | None = None
    num_probes: int = 32
    num_neighbors: int = 32
    sharded: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that hold nothing, and parts of what has none."""
        if self.sharded and self.search != "exact":
            raise ConfigError(
                f"index.sharded: only exact search has parts. Set index.search: exact, not {self.search}."
            )
        for name in ("rows_per_shard", "batch_size", "num_probes", "num_neighbors"):
            if getattr(self, name) < 1:
                raise ConfigError(f"index.{name} is {getattr(self, name)}; use 1 or more.")


class PassageIndex:
    """Passages with their embeddings, searched by inner product.

    Args:
        manifest: What it was made of.
        shards: Embeddings in order, [n, D] each.
        passages: Ids, titles and texts in the same order.
        faiss: A FAISS index that searches instead of the exact search.
        compare: Called with the name of a file before it is read.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: list[Tensor],
        passages: datasets.Dataset,
        faiss: Any | None = None,
        compare: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Check that the parts belong together."""
        self.compare = compare
        self.manifest, self.shards, self.passages, self.faiss = manifest, shards, passages, faiss
        self._part: tuple[Tensor, int] | None = None  # embeddings of this process, and the first one's position
        rows = sum(len(shard) for shard in shards)
        if not len(passages) == rows == manifest.count:
            raise ConfigError(
                f"the index has {len(passages)} passages, {rows} embeddings, and its manifest says {manifest.count}. "
                "Build it again."
            )

    @classmethod
    def load(cls, folder: str | Path) -> "PassageIndex":
        """Map an index from its folder.

        Raises:
            FileNotFoundError: If there is none.
            ConfigError: If it is damaged, or faiss is needed and not installed.
        """
        folder = Path(folder).expanduser()
        manifest = read_manifest(folder)
        if not (folder / PASSAGES).is_file():
            raise ConfigError(f"{folder}: {PASSAGES} is missing. Build the index again.")
        searcher = None
        try:
            if manifest.search != "exact":
                faiss = require("faiss", "rag", "index.search: exact")
                searcher = faiss.read_index(str(folder / FAISS_FILE), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            passages = datasets.Dataset.from_file(str(folder / PASSAGES))
            if passages.features != PASSAGE_FEATURES or any(column.null_count for column in passages.data.columns):
                raise ValueError(f"{PASSAGES} has {passages.features}, and needs texts in {[*PASSAGE_FEATURES]}")
        except (RuntimeError, OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
            raise ConfigError(f"{folder}: damaged ({error}). Build the index again.") from error
        shards, compare = map_shards(folder, manifest), FileChecks(folder, manifest.checksums)
        return cls(manifest, shards, passages, searcher, compare)

    def __len__(self) -> int:
        """Number of passages."""
        return self.manifest.count

    def check_width(self, width: int, encoder: str) -> None:
        """Refuse queries of another width.

        Raises:
            ConfigError: Naming both.
        """
        if width != self.manifest.dimension:
            raise ConfigError(
                f"the index holds vectors of {self.manifest.dimension} numbers (made by {self.manifest.encoder['path']}"
                f"), but {encoder} makes {width}. Build it with that encoder: lit-alignment index build --overwrite."
            )

    def check_made_by(self, encoder: dict[str, Any], encoder_hash: str) -> None:
        """Refuse an index whose passages another encoder, or the same with other settings or weights, has encoded.

        Args:
            encoder: The settings that decide the embeddings of passages.
            encoder_hash: Hash of the passage encoder's weights.

        Raises:
            ConfigError: Saying what differs.
        """
        made = self.manifest.encoder
        changed = [name for name, value in encoder.items() if name != "path" and made.get(name) != value]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"the index is stale: it was made with {name}: {made.get(name)!r}, and the retriever has "
                f"{encoder[name]!r}. Build it again: lit-alignment index build --overwrite."
            )
        if encoder_hash != self.manifest.encoder_hash:
            raise ConfigError(
                f"the index is stale: its passages were encoded with weights {self.manifest.encoder_hash[:8]}... of "
                f"{made['path']}, and the retriever's passage encoder has {encoder_hash[:8]}... "
                "Build it again: lit-alignment index build --overwrite (with --ckpt_path for trained weights)."
            )

    def search(self, queries: Tensor, k: int, together: bool = False) -> tuple[Tensor, Tensor]:
        """Scores and positions of the K best passages, both [B, K], best first; fewer if there are fewer.

        Both are where the embeddings are: on the CPU, or, of a search `together`, on the queries' device.

        Args:
            queries: [B, D].
            k: K.
            together: Whether all processes search at this moment, each in its own part.
        """
        self.check_width(queries.shape[1], "the query encoder")
        k = min(k, len(self))
        queries = queries.detach()
        if together:
            return sharded_search(queries, *self._own_part(queries.device), k)
        if self.faiss is None:
            return exact_search(queries, self._compared(), k)
        self.compare(FAISS_FILE)
        queries = queries.float().cpu()
        scores, positions = (torch.from_numpy(each) for each in self.faiss.search(queries.numpy(), k))
        short = (positions < 0).any(1)  # the clusters that were looked into held fewer than K
        if short.any():
            scores[short], positions[short] = exact_search(queries[short], self._compared(), k)
        return scores, positions

    def _shard(self, number: int) -> Tensor:
        """Embeddings whose file, if they have one, is read now."""
        if self.manifest.shards:
            self.compare(self.manifest.shards[number][0])
        return self.shards[number]

    def _compared(self) -> list[Tensor]:
        return [self._shard(number) for number in range(len(self.shards))]

    def _own_part(self, device: torch.device) -> tuple[Tensor, int]:
        """This process's part of the embeddings, on its device, and the place of the first."""
        if self._part is None:
            rank, world_size = dist.get_rank(), dist.get_world_size()
            first, last = (len(self) * each // world_size for each in (rank, rank + 1))
            rows, start = [], 0
            for number, shard in enumerate(self.shards):
                own = slice(max(first - start, 0), max(last - start, 0))
                rows.append(self._shard(number)[own] if len(shard[own]) else shard[:0])
                start += len(shard)
            self._part = torch.cat(rows).to(device), first
        return self._part

    def embeddings(self, positions: Tensor) -> Tensor:
        """Stored embeddings at the given positions, fp32, [..., D], on the CPU, where both are."""
        flat = positions.reshape(-1).numpy()  # NumPy knows no device, so nobody takes its reads for waits
        rows = torch.empty(len(flat), self.manifest.dimension, dtype=torch.float32)
        start = 0
        for number, shard in enumerate(self.shards):
            inside = np.flatnonzero((flat >= start) & (flat < start + len(shard)))
            if len(inside):
                local = torch.from_numpy(flat[inside] - start)
                rows[torch.from_numpy(inside)] = self._shard(number)[local].float()
            start += len(shard)
        return rows.view(*positions.shape, -1)

    def at(self, positions: Tensor) -> list[Passage]:
        """The passages at the given positions, [K]."""
        self.compare(PASSAGES)
        rows = self.passages[positions.tolist()]
        columns = zip(rows["id"], rows["title"], rows["text"], strict=True)
        return [Passage(id, title, text) for id, title, text in columns]


def make_faiss(shards: list[Tensor], config: IndexConfig) -> Any:
    """A FAISS index of the embeddings.

    Raises:
        ConfigError: If faiss is not installed, or there are fewer passages than clusters.
    """
    faiss = require("faiss", "rag", "index.search: exact")
    count, width = sum(len(shard) for shard in shards), shards[0].shape[1]
    match config.search:
        case "ivf":
            clusters = config.num_clusters or max(1, round(4 * count**0.5))
            if clusters > count:
                raise ConfigError(f"index.num_clusters is {clusters}, more than the {count} passages. Lower it.")
            made = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, clusters, faiss.METRIC_INNER_PRODUCT)
            made.nprobe = min(config.num_probes, clusters)
            every = max(1, count // (64 * clusters))  # FAISS learns a cluster well from some dozen vectors
            made.train(torch.cat([shard[::every].float() for shard in shards]).numpy())
        case "hnsw":
            made = faiss.IndexHNSWFlat(width, config.num_neighbors, faiss.METRIC_INNER_PRODUCT)
        case _:
            made = faiss.IndexFlatIP(width)
    for shard in shards:
        for rows in torch.split(shard, 65536):
            made.add(rows.float().numpy())
    return made
