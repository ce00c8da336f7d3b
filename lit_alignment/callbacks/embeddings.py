"""Embeddings of `predict` into an index."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_alignment.data.base import datamodule_of
from lit_alignment.data.passages import Passage
from lit_alignment.data.retriever import PassageBatch
from lit_alignment.errors import ConfigError
from lit_alignment.models.dual_encoder import weights_hash
from lit_alignment.modules.retriever import RetrieverModule
from lit_alignment.retrieval.build import IndexBuilder
from lit_alignment.retrieval.files import Manifest
from lit_alignment.retrieval.index import IndexConfig


class EmbeddingWriter(Callback):
    """Write an index of the passages that `predict` encodes; every rank writes its own rows.

    Args:
        index: Where, and of which kind.
    """

    def __init__(self, index: IndexConfig) -> None:
        """Files are made when the run starts."""
        self.index = index
        self._builder: IndexBuilder | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for all embeddings."""
        if not isinstance(pl_module, RetrieverModule):
            raise ConfigError(f"an index is built by a RetrieverModule, not by {type(pl_module).__name__}.")
        encoder = pl_module.encoder
        rows = datamodule_of(trainer).examples["predict"]
        manifest = Manifest(
            encoder=pl_module.retriever.decides_passages(),
            encoder_hash=weights_hash(encoder.passage_tower),
            dimension=encoder.width,
            dtype=self.index.dtype,
            count=len(rows),
        )
        self._builder = IndexBuilder(self.index, manifest)
        if trainer.is_global_zero:
            columns = zip(rows["id"], rows["title"], rows["text"], strict=True)
            self._builder.create([Passage(id, title, text) for id, title, text in columns])
        trainer.strategy.barrier("index")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PassageBatch, *_: Any
    ) -> None:
        """Write the batch's rows."""
        if self._builder is not None:
            self._builder.write([item.index for item in batch.items], outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the index its name."""
        trainer.strategy.barrier("index")
        if self._builder is not None and trainer.is_global_zero:
            rank_zero_info(f"index: {self._builder.finish()}")
        trainer.strategy.barrier("index")
