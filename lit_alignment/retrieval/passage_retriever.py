"""What retrieves passages for queries: a dual encoder and the index of what its passage tower has encoded.

B queries, K passages of a query, D width
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_alignment.data.passages import Passage, format_passage
from lit_alignment.errors import ConfigError
from lit_alignment.models.dual_encoder import DualEncoder, RetrieverConfig, load_retriever, weights_hash
from lit_alignment.models.varlen import to_device
from lit_alignment.retrieval.index import IndexConfig, PassageIndex

TrainedTowers = Literal["none", "query", "both"]


class PassageRetriever:
    """Retrieves passages, with scores that carry the gradient of the towers that train.

    No torch module: the towers are submodules of the LightningModule that trains them.

    Args:
        config: The dual encoder.
        index_config: The index.
        num_passages: K, passages of each query.
        over_retrieve: Take this many times as many passages from the index, encode them anew, and keep the best.
        trained: Which towers train.

    Attributes:
        refreshed: Whether somebody encodes the passages anew while their tower learns.
    """

    def __init__(
        self,
        config: RetrieverConfig,
        index_config: IndexConfig,
        num_passages: int,
        over_retrieve: int = 1,
        trained: TrainedTowers = "none",
    ) -> None:
        """Keep the settings; towers and index come in `load`.

        Raises:
            ConfigError: If no passage would be retrieved.
        """
        if num_passages < 1 or over_retrieve < 1:
            raise ConfigError("model.num_passages and model.over_retrieve must be 1 or more.")
        self.config, self.index_config = config, index_config
        self.num_passages, self.over_retrieve, self.trained = num_passages, over_retrieve, trained
        self.refreshed = False
        self._encoder: DualEncoder | None = None
        self._index: PassageIndex | None = None
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}  # what a frozen encoder has retrieved for a query

    def load(self) -> DualEncoder:
        """Load the index, and the encoder that fits it, frozen but for what trains.

        Raises:
            FileNotFoundError: If there is no index.
            ConfigError: If the index was made by an encoder of another width.
        """
        self.index = PassageIndex.load(self.index_config.path)
        self._encoder = load_retriever(self.config)
        self.index.check_width(self._encoder.width, self.config.path)
        self._encoder.requires_grad_(self.trained != "none")
        if self.trained == "query":
            self._encoder.passage_tower.requires_grad_(False)
        return self._encoder

    @property
    def encoder(self) -> DualEncoder:
        """The loaded encoder.

        Raises:
            ConfigError: Before `load`.
        """
        if self._encoder is None:
            raise ConfigError("the retriever is not loaded yet: call configure_model() or run it in a Trainer.")
        return self._encoder

    @property
    def index(self) -> PassageIndex:
        """The loaded index; a new one takes its place in one step.

        Raises:
            ConfigError: Before `load`.
        """
        if self._index is None:
            raise ConfigError("the index is not loaded yet: call configure_model() or run it in a Trainer.")
        return self._index

    @index.setter
    def index(self, index: PassageIndex) -> None:
        self._index = index
        self._cache.clear()

    def check_index(self) -> None:
        """Refuse a stale index; asked once the weights are those of the checkpoint, if there is one.

        Raises:
            ConfigError: Saying what differs.
        """
        self.index.check_made_by(self.config.decides_passages(), weights_hash(self.encoder.passage_tower))

    def check_kept_up(self) -> None:
        """Refuse a training whose index would be stale, or would fall behind passages that learn.

        Raises:
            ConfigError: Saying what to do.
        """
        if self.trained != "both":
            self.check_index()
        elif not self.refreshed:
            raise ConfigError(
                "model.train_retriever is both, so the index would fall behind its encoder. Add the callback "
                "lit_alignment.IndexRefresh to trainer.callbacks, or train the query tower alone."
            )

    def retrieve(self, queries: Sequence[str], together: bool = False) -> tuple[list[list[Passage]], Tensor]:
        """The K best passages of each query, and their scores with the gradient that trains the towers, [B, K].

        Scores are inner products divided by the temperature. A frozen encoder retrieves for each query once, in all
        epochs together.

        Args:
            queries: Texts.
            together: Every process searches its part of the index for the queries of all; all have to call.
        """
        if self.trained != "none" or together:
            positions, scores = self._search(queries, together)
        else:
            new = list(dict.fromkeys(query for query in queries if query not in self._cache))
            if new:
                rows = zip(*self._search(new, together), strict=True)
                self._cache.update(zip(new, rows, strict=True))
            positions, scores = (
                torch.stack(rows) for rows in zip(*(self._cache[query] for query in queries), strict=True)
            )
        return [self.index.at(row) for row in positions], scores

    def _search(self, queries: Sequence[str], together: bool) -> tuple[Tensor, Tensor]:
        """Positions in the index of the K best passages of each query, on the CPU, and their scores, both [B, K]."""
        vectors = self.encoder.queries(queries)
        _, positions = self.index.search(vectors, self.num_passages * self.over_retrieve, together=together)
        positions = positions.cpu()
        if self.over_retrieve > 1:
            with torch.no_grad():
                fresh = self._encoded(positions)
                _, best = torch.einsum("bd,bkd->bk", vectors, fresh).topk(min(self.num_passages, positions.shape[1]))
            positions = positions.gather(1, best.cpu())
        # An index always lags behind towers that learn; the scores do not.
        passages = (
            self._encoded(positions)
            if self.trained == "both" or self.over_retrieve > 1
            else to_device(self.index.embeddings(positions), vectors.device).to(vectors.dtype)
        )
        return positions, torch.einsum("bd,bkd->bk", vectors, passages) / self.config.temperature

    def _encoded(self, positions: Tensor) -> Tensor:
        """Passages at positions of the index, encoded by the passage tower as it is now, [B, K, D]."""
        unique, inverse = np.unique(positions.numpy(), return_inverse=True)
        form = self.config.passage_format
        texts = [
            format_passage(form, passage.title, passage.text) for passage in self.index.at(torch.from_numpy(unique))
        ]
        encoded = self.encoder.passages(texts)
        return encoded[to_device(torch.from_numpy(inverse).view(positions.shape), encoded.device)]
