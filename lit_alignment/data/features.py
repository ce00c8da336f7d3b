"""Files to encode: what `lit-alignment preprocess` reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.multimodal.media import MediaReader, UnreadableMediaError


@dataclass
class FileBatch:
    """Files to encode together.

    Args:
        names: Their names in the cache.
        inputs: What the processors made of them, for each encoder; empty if none could be read.
        unreadable: Files that could not be read, each with the reason.
    """

    names: list[str]
    inputs: list[Tensor]
    unreadable: list[tuple[str, str]]


class FileDataModule(LightningDataModule):
    """Files for `predict`, which encodes them; each process has its own.

    Args:
        files: Name in the cache and path of each.
        reader: Reads them.
        batch_size: Files to encode together.
        num_workers: Processes that read ahead.
    """

    def __init__(
        self, files: Sequence[tuple[str, str]], reader: MediaReader, batch_size: int = 64, num_workers: int = 0
    ) -> None:
        """Nothing is read yet."""
        super().__init__()
        self.files, self.reader, self.batch_size, self.num_workers = files, reader, batch_size, num_workers

    def predict_dataloader(self) -> PlannedLoader[FileBatch]:
        """This process's files in order, as many at a time as are encoded together."""
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        own = list(range(len(self.files)))[rank::ranks]
        plan = [PlannedBatch(own[i : i + self.batch_size], 0.0) for i in range(0, len(own), self.batch_size)]
        return PlannedLoader(lambda epoch: plan, self._read, len(plan), ranks, self.num_workers)

    def _read(self, planned: PlannedBatch) -> FileBatch:
        names, parts, unreadable = [], [], []
        for name, path in (self.files[index] for index in planned.indices):
            try:
                parts.append(self.reader.read(path))
                names.append(name)
            except UnreadableMediaError as error:
                unreadable.append((path, str(error)))
        return FileBatch(names, [torch.stack(each) for each in zip(*parts, strict=True)], unreadable)
