"""One kind of media of a composed model: encoders, projector, and the tokens that stand for them.

B images, P patches, D_in width of the features, Q embeddings of an image, D_out width of the language model
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_alignment.data.multimodal.media import MAX_PIXELS, MAX_SAMPLES
from lit_alignment.errors import ConfigError
from lit_alignment.files import config_from
from lit_alignment.models.multimodal.projectors import ProjectorConfig, build_projector
from lit_alignment.models.multimodal.vision import (
    EncoderConfig,
    FeatureEncoder,
    feature_shape,
    load_encoder,
    load_processor,
)

TOWERS = "towers"  # what modules call encoders and projectors, and so checkpoints


@dataclass(frozen=True)
class ModalityConfig:
    """How images, or sounds, enter a language model.

    Args:
        encoders: What makes features of them; those of several are put side by side, patch by patch.
        projector: What makes embeddings of the features.
        token: The placeholder of one embedding, and of an image in the texts of records; `<image>` or `<audio>` by
            default. It is added to the tokenizer where it lacks it.
        start: A token before the placeholders of an image, likewise added; none by default.
        end: A token after them.
        tokens_per_item: Placeholders of an image, if you want them checked; they follow from encoder and projector.
        cache: Features that `lit-alignment preprocess` has made, by which the encoder need not even be loaded.
        max_pixels: Largest image that is decoded; a larger one is unreadable.
        max_samples: Longest sound that is read, in samples of all channels, and at the encoder's rate.
    """

    encoders: list[EncoderConfig]
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    token: str | None = None
    start: str | None = None
    end: str | None = None
    tokens_per_item: int | None = None
    cache: str | None = None
    max_pixels: int = MAX_PIXELS
    max_samples: int = MAX_SAMPLES

    def __post_init__(self) -> None:
        """Refuse a modality without an encoder."""
        if not self.encoders:
            raise ConfigError("encoders is empty: give at least one, {path: FOLDER}.")
        for name, value in (("max_pixels", self.max_pixels), ("max_samples", self.max_samples)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; use 1 or more.")

    def placeholder(self, name: str) -> str:
        """The placeholder of a modality of this name."""
        return self.token or f"<{name}>"

    def new_tokens(self, name: str) -> list[str]:
        """Tokens that the tokenizer needs."""
        return [token for token in (self.placeholder(name), self.start, self.end) if token]


class MediaShape:
    """Sizes of a modality, found from configurations alone, and the processors of its encoders.

    Args:
        name: `image` or `audio`.
        modality: Its settings.
    """

    def __init__(self, name: str, modality: ModalityConfig) -> None:
        """Load the processors, and run the encoders without weights.

        Raises:
            ConfigError: If encoders do not fit together, or the number of placeholders is wrong.
        """
        self.name, self.modality = name, modality
        self.processors = [load_processor(encoder, name) for encoder in modality.encoders]
        self.blank = [_blank(processor, name) for processor in self.processors]
        pairs = zip(modality.encoders, self.blank, strict=True)
        shapes = [feature_shape(encoder, name, blank) for encoder, blank in pairs]
        if len({patches for patches, _ in shapes}) > 1:
            counts = ", ".join(f"{e.path}: {p}" for e, (p, _) in zip(modality.encoders, shapes, strict=True))
            raise ConfigError(
                f"model.{name}.encoders have unequal numbers of patches ({counts}), so they cannot be put side by side."
            )
        self.num_patches, self.width = shapes[0][0], sum(width for _, width in shapes)
        self.number = modality.projector.tokens_of(self.num_patches)
        if modality.tokens_per_item not in (None, self.number):
            raise ConfigError(
                f"model.{name}.tokens_per_item is {modality.tokens_per_item}, but the projector makes {self.number} "
                f"embeddings of each {name}. Set it to {self.number}, or leave it out."
            )

    def nothing(self) -> list[Tensor]:
        """Inputs of one image that is not there."""
        if self.modality.cache is not None:
            return [torch.zeros(1, self.num_patches, self.width)]
        return [torch.zeros(1, *blank.shape) for blank in self.blank]


def _blank(processor: Any, name: str) -> Tensor:
    """What the processor makes of nothing, for its shape."""
    if name == "audio":
        silence = np.zeros(processor.sampling_rate, np.float32)
        inputs = processor(silence, sampling_rate=processor.sampling_rate, return_tensors="pt")["input_features"]
    else:
        inputs = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    return torch.as_tensor(inputs[0])


class MediaTower(nn.Module):
    """Encoders and projector of a modality.

    Args:
        encoders: Empty where features come from a cache.
        projector: [B, P, D_in] -> [B, Q, D_out].
        trained: Whether the encoders learn.
    """

    def __init__(self, encoders: list[FeatureEncoder], projector: nn.Module, trained: bool) -> None:
        """Keep the parts."""
        super().__init__()
        self.encoders, self.projector, self.trained = nn.ModuleList(encoders), projector, trained

    def features(self, inputs: list[Tensor]) -> Tensor:
        """[B, P, D_in] of what a reader gave for B files, in one call of each encoder."""
        if not self.encoders:
            return inputs[0]
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            found = []
            for encoder, own in zip(self.encoders, inputs, strict=True):
                dtype = next(encoder.parameters()).dtype
                found.append(encoder.encode(own.to(dtype)))  # type: ignore[operator]
        return torch.cat(found, -1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """[B, Q, D_out], in the projector's precision."""
        features = self.features(inputs)
        found: Tensor = self.projector(features.to(next(self.projector.parameters()).dtype))
        return found


def load_tower(shape: MediaShape, width_out: int, train_encoder: bool, device_type: str) -> MediaTower:
    """The encoders, unless features are cached, and a new projector.

    Args:
        shape: Sizes and settings.
        width_out: D_out.
        train_encoder: Whether the encoders learn.
        device_type: Where it will run.
    """
    modality = shape.modality
    encoders = []
    if modality.cache is None:
        encoders = [load_encoder(each, shape.name, train_encoder, device_type) for each in modality.encoders]
        if train_encoder:
            for encoder, blank in zip(encoders, shape.blank, strict=True):
                _freeze_unused(encoder, blank)
    # Drawn under the run's seed and nothing else, so that all ranks begin alike.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        projector = build_projector(modality.projector, shape.num_patches, shape.width, width_out)
    return MediaTower(encoders, projector, train_encoder)


def _freeze_unused(encoder: FeatureEncoder, blank: Tensor) -> None:
    """Freeze what the features do not depend on, such as layers above the one that is taken.

    Distributed training would wait for its gradients.

    Args:
        encoder: A trained encoder.
        blank: Inputs of one image.
    """
    encoder.encode(blank[None]).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def read_modality(values: Any, where: object) -> ModalityConfig:
    """A modality from plain values of a file."""
    encoders = [config_from(EncoderConfig, each, where) for each in values["encoders"]]
    parts = {"encoders": encoders, "projector": config_from(ProjectorConfig, values["projector"], where)}
    return config_from(ModalityConfig, {**values, **parts}, where)


def save_towers(towers: dict[str, MediaTower], folder: Path, trained: dict[str, Tensor]) -> None:
    """Write `MODALITY/projector.safetensors`, which a projector's `weights` takes, and trained encoders beside.

    Args:
        towers: Encoders and projectors; their live weights are left as they are.
        folder: Where.
        trained: A checkpoint's weights to write instead of the live ones, by name.
    """
    for name, tower in towers.items():
        (folder / name).mkdir(parents=True)
        save_file(tower_state(tower.projector, f"{name}.projector.", trained), folder / name / "projector.safetensors")
        if tower.trained:
            state = tower_state(tower.encoders, f"{name}.encoders.", trained)
            save_file(state, folder / name / "encoders.safetensors")


def tower_state(part: nn.Module, prefix: str, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a part of a tower, on the CPU, those of a checkpoint where it has them.

    Args:
        part: The encoders or the projector.
        prefix: What stands before their names in the checkpoint.
        trained: The checkpoint's weights.
    """
    state = {name: trained.get(prefix + name, value) for name, value in part.state_dict().items()}
    return {name: value.detach().contiguous().cpu() for name, value in state.items()}
