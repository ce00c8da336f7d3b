"""Features of `predict` into a cache, shard by shard."""

import json
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_alignment.data.features import FileBatch
from lit_alignment.data.multimodal.feature_cache import UNREADABLE, CacheIndex, ShardWriter, stored, write_index


class FeatureWriter(Callback):
    """Write features as they come; a killed run goes on after its last shard.

    Args:
        folder: The cache.
        index: What makes it.
        per_shard: Files in one shard.
    """

    def __init__(self, folder: Path, index: CacheIndex, per_shard: int) -> None:
        """The index is written before anything else, so that a half-made cache says what made it."""
        self.folder, self.index, self.per_shard = folder, index, per_shard
        self._writer: ShardWriter | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Number on from the shards that are there."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / UNREADABLE).unlink(missing_ok=True)
            write_index(self.folder, self.index)
        trainer.strategy.barrier("features")
        self._writer = ShardWriter(self.folder, trainer.global_rank, self.per_shard)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor | None, batch: FileBatch, *_: int
    ) -> None:
        """Take a batch's features, and write down what could not be read."""
        if self._writer is not None and outputs is not None:
            for name, features in zip(batch.names, stored(outputs, self.index.dtype), strict=True):
                self._writer.add(name, features.clone())
        if batch.unreadable:
            with (self.folder / UNREADABLE).open("a", encoding="utf-8") as file:
                for path, reason in batch.unreadable:
                    file.write(json.dumps({"path": path, "reason": reason}) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rest, and say that the cache is complete."""
        if self._writer is not None:
            self._writer.flush()
        trainer.strategy.barrier("features")
        if trainer.is_global_zero:
            write_index(self.folder, replace(self.index, complete=True))
