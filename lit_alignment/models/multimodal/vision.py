"""Feature encoders: one interface over the image and sound models of transformers.

B images or sounds, P patches, D width
"""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

# By its own module: by the package's name transformers 5.17 hands it out beside torchvision alone.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import BackboneConfig, from_pretrained
from lit_alignment.paths import local_path

HASHED = ("config.json", "preprocessor_config.json")  # besides the weights
IMAGEBIND = "imagebind"


@dataclass(frozen=True)
class EncoderConfig:
    """A pretrained encoder, and which of its features to take.

    Args:
        path: A local folder or a name on the hub, with its `preprocessor_config.json`: a vision model such as CLIP,
            SigLIP or DINOv2, or a Whisper model for sounds. `imagebind` takes ImageBind, if its package is installed.
        layer: The hidden state to take: -1 the last, -2 the one before, as LLaVA does.
        keep_cls: Also take the class token's vector, before those of the patches.
        weights: `random` takes only the configuration from `path`.
        revision: Branch, tag or commit on the hub.
        dtype: Precision of frozen weights; `auto` is bfloat16 on a GPU, else float32.
    """

    path: str
    layer: int = -2
    keep_cls: bool = False
    weights: Literal["pretrained", "random"] = "pretrained"
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def backbone(self) -> BackboneConfig:
        """The same for what loads models."""
        return BackboneConfig(self.path, revision=self.revision, weights=self.weights)


class FeatureEncoder(nn.Module):
    """What turns images, or sounds, into feature vectors: subclass it to add one."""

    def encode(self, inputs: Tensor) -> Tensor:
        """What the processor makes of B files, [B, ...] -> [B, P, D]."""
        raise NotImplementedError


class VisionEncoder(FeatureEncoder):
    """A transformers vision model: of its tokens the patches', or the positions of its last feature maps.

    Args:
        model: Any model with `pixel_values` and hidden states [B, T, D] or [B, D, H, W].
        config: Which hidden state.
    """

    def __init__(self, model: PreTrainedModel, config: EncoderConfig) -> None:
        """Keep the model."""
        super().__init__()
        self.model, self.layer, self.keep_cls, self.path = model, config.layer, config.keep_cls, config.path

    def encode(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, P, D].

        Raises:
            ConfigError: If there is no such layer, or no class token to keep.
        """
        states = self.model(pixel_values=pixel_values, output_hidden_states=True).hidden_states
        if not -len(states) <= self.layer < len(states):
            raise ConfigError(f"{self.path}: encoder.layer is {self.layer}, and there are {len(states)} hidden states.")
        hidden: Tensor = states[self.layer]
        if hidden.ndim == 4:
            prefix, hidden = 0, hidden.flatten(2).transpose(1, 2)
        else:
            prefix = hidden.shape[1] - self._patches(pixel_values)
        if not self.keep_cls:
            return hidden[:, prefix:]
        if prefix == 0:
            raise ConfigError(f"{self.path} has no class token: set encoder.keep_cls to false.")
        return torch.cat([hidden[:, :1], hidden[:, prefix:]], 1)  # registers between the two say nothing of a position

    def _patches(self, pixel_values: Tensor) -> int:
        """Number of patches of an image; what stands before them are class token and registers."""
        size = int(self.model.config.patch_size)
        return (pixel_values.shape[2] // size) * (pixel_values.shape[3] // size)


class SoundEncoder(FeatureEncoder):
    """The encoder of a Whisper-like model, averaged over neighbouring frames to at most 64 vectors a sound.

    Args:
        model: A model with an `encoder` of `input_features`.
        config: Which hidden state.
    """

    MOST = 64

    def __init__(self, model: PreTrainedModel, config: EncoderConfig) -> None:
        """Keep the encoder alone."""
        super().__init__()
        self.model, self.layer = model.get_encoder(), config.layer

    def encode(self, input_features: Tensor) -> Tensor:
        """[B, mel bands, frames] -> [B, P, D]."""
        states = self.model(input_features, output_hidden_states=True).hidden_states
        frames = states[self.layer]
        number = min(self.MOST, frames.shape[1])
        return nn.functional.adaptive_avg_pool1d(frames.transpose(1, 2), number).transpose(1, 2)


class ImageBindEncoder(FeatureEncoder):
    """ImageBind's one normalised vector of an image. Source: Girdhar et al. 2023 (arXiv:2305.05665)."""

    def __init__(self) -> None:
        """Load the weights that its package names.

        Raises:
            ConfigError: If the package is not installed.
        """
        super().__init__()
        try:
            found = importlib.import_module("imagebind.models.imagebind_model")
        except ImportError as error:
            raise ConfigError(
                f"encoders: imagebind needs its package ({error}). It asks for a torch of 2022, so install it without "
                "that: pip install --no-deps imagebind-packaged, and then what it imports."
            ) from error
        self.model = found.imagebind_huge(pretrained=True)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> [B, 1, 1024]."""
        vectors: Tensor = self.model({"vision": pixel_values})["vision"]
        return vectors[:, None]


def load_encoder(config: EncoderConfig, modality: str, trained: bool, device_type: str) -> FeatureEncoder:
    """An encoder; a frozen one in eval mode and without gradients.

    Args:
        config: Which one.
        modality: `image` or `audio`.
        trained: Whether it learns; then it is in fp32.
        device_type: Where it will run.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    half = not trained and (config.dtype == "bfloat16" or (config.dtype == "auto" and device_type == "cuda"))
    dtype = torch.bfloat16 if half else torch.float32
    if config.path == IMAGEBIND:
        encoder: FeatureEncoder = ImageBindEncoder().to(dtype)
    else:
        settings = _model_config(config)
        if config.weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # the same weights in every command, or no cache would fit them
                model = AutoModel.from_config(settings, dtype=dtype)
        else:
            model = from_pretrained(AutoModel, config.backbone, config.path, dtype=dtype)
        encoder = _wrapped(model, config, modality)
    return encoder.train() if trained else encoder.requires_grad_(False).eval()


def _wrapped(model: PreTrainedModel, config: EncoderConfig, modality: str) -> FeatureEncoder:
    if modality == "audio":
        return SoundEncoder(model, config)
    return VisionEncoder(getattr(model, "vision_model", model), config)


def _model_config(config: EncoderConfig) -> PretrainedConfig:
    found: PretrainedConfig = from_pretrained(AutoConfig, config.backbone, config.path)
    return found


def load_processor(config: EncoderConfig, modality: str) -> Any:
    """What makes an encoder's inputs of a picture or a waveform, without torchvision.

    Raises:
        ConfigError: If the encoder's folder has none.
    """
    if config.path == IMAGEBIND:
        from transformers import CLIPImageProcessorPil

        return CLIPImageProcessorPil()  # ImageBind's own sizes, means and deviations are CLIP's
    if modality == "audio":
        return from_pretrained(AutoFeatureExtractor, config.backbone, config.path)
    return from_pretrained(AutoImageProcessor, config.backbone, config.path, backend="pil")


def feature_shape(config: EncoderConfig, modality: str, inputs: Tensor) -> tuple[int, int]:
    """P and D of an encoder for inputs of the given shape, found without its weights.

    Args:
        config: Which one.
        modality: `image` or `audio`.
        inputs: What the processor makes of one file.
    """
    if config.path == IMAGEBIND:
        return 1, 1024
    with torch.device("meta"):
        encoder = _wrapped(AutoModel.from_config(_model_config(config)), config, modality).eval()
        with torch.no_grad():
            features = encoder.encode(torch.empty(1, *inputs.shape))
    return int(features.shape[1]), int(features.shape[2])


def encoder_fingerprint(config: EncoderConfig) -> dict[str, Any]:
    """What decides the features: settings, and a hash of configuration, processor and weight files.

    The weights need not be loaded for it.
    """
    settings = {name: getattr(config, name) for name in ("layer", "keep_cls", "weights")}
    digest = hashlib.sha256()
    folder = Path(local_path(config.path)) if config.path != IMAGEBIND else Path(config.path)
    if folder.is_dir():
        weights = (
            sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if config.weights == "pretrained" else []
        )
        for file in [folder / name for name in HASHED] + weights:
            if file.is_file():
                digest.update(file.name.encode())
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
    else:
        digest.update(f"{config.path}@{config.revision}".encode())
    return {**settings, "hash": digest.hexdigest()[:32]}
