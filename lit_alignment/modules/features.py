"""Encoders alone: `predict` makes features of images or sounds.

B files, P patches, D width
"""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_alignment.data.features import FileBatch
from lit_alignment.models.multimodal.modality import MediaShape, MediaTower
from lit_alignment.models.multimodal.vision import load_encoder


class FeatureModule(LightningModule):
    """The frozen encoders of a modality.

    Args:
        shape: The modality.
    """

    def __init__(self, shape: MediaShape) -> None:
        """Weights come in `configure_model`."""
        super().__init__()
        self.shape = shape
        self.tower: MediaTower | None = None

    def configure_model(self) -> None:
        """Load the encoders, once."""
        if self.tower is None:
            device = self.trainer.strategy.root_device.type
            encoders = [load_encoder(each, self.shape.name, False, device) for each in self.shape.modality.encoders]
            self.tower = MediaTower(encoders, nn.Identity(), trained=False)

    @torch.no_grad()
    def predict_step(self, batch: FileBatch, batch_idx: int) -> Tensor | None:
        """Features of the files that could be read, [B, P, D]; None if there are none."""
        return self.tower.features(batch.inputs) if batch.names and self.tower is not None else None
