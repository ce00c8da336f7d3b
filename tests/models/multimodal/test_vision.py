"""Encoders: which hidden states of which model, without weights the same sizes, several side by side, and sounds."""

import json
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    MobileNetV2Config,
    SiglipVisionConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from lit_alignment.errors import ConfigError
from lit_alignment.models.multimodal.modality import MediaShape, ModalityConfig, load_tower
from lit_alignment.models.multimodal.projectors import ProjectorConfig
from lit_alignment.models.multimodal.vision import EncoderConfig, encoder_fingerprint, load_encoder
from tests.helpers import IMAGE, ROOT, VISION, step_gradients, vlm_data, vlm_module

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
COARSE = SIZES | {"patch_size": 16}
CLIP = CLIPConfig(
    vision_config=SIZES | {"intermediate_size": 48},
    text_config={"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
)
MODELS = {
    "clip": (CLIP, 1),
    "siglip": (SiglipVisionConfig(**SIZES, intermediate_size=48), 0),
    "dinov2": (Dinov2Config(**SIZES), 1),
    "registers": (Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3), 4),
}


def folder(path, model, **processor):
    """A folder with weights and a processor."""
    model.save_pretrained(path)
    settings = json.loads((ROOT / "configs/tiny_vision/preprocessor_config.json").read_text()) | processor
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_patches_of_a_layer_without_class_token_and_registers(name, layer, tmp_path):
    config, prefix = MODELS[name]
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    path = folder(tmp_path / name, model)
    shape = MediaShape("image", ModalityConfig([EncoderConfig(path, layer)]))
    assert (shape.num_patches, shape.width) == (16, 24)
    encoder = load_encoder(EncoderConfig(path, layer), "image", False, "cpu")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = getattr(model, "vision_model", model)(pixel_values=pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(encoder.encode(pixels), states[layer][:, prefix:])
        if prefix:
            kept = load_encoder(EncoderConfig(path, layer, keep_cls=True), "image", False, "cpu").encode(pixels)
            torch.testing.assert_close(kept, torch.cat([states[layer][:, :1], states[layer][:, prefix:]], 1))
        else:
            with pytest.raises(ConfigError, match="has no class token"):
                MediaShape("image", ModalityConfig([EncoderConfig(path, layer, keep_cls=True)]))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_places_of_feature_maps_are_patches(tmp_path):
    model = AutoModel.from_config(MobileNetV2Config(depth_multiplier=0.35, image_size=64))
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    path = folder(tmp_path / "mobilenet", model, **sizes)
    shape = MediaShape("image", ModalityConfig([EncoderConfig(path, layer=-1)]))
    encoder = load_encoder(EncoderConfig(path, layer=-1), "image", False, "cpu")
    found = encoder.encode(torch.randn(2, 3, 64, 64))
    assert found.shape == (2, shape.num_patches, shape.width) and shape.num_patches == 4


def test_features_of_several_encoders_stand_side_by_side(tmp_path):
    path = folder(tmp_path / "siglip", AutoModel.from_config(MODELS["siglip"][0]), image_mean=[0.5] * 3)
    modality = ModalityConfig([VISION, EncoderConfig(path)], ProjectorConfig("mlp"))
    shape = MediaShape("image", modality)
    assert (shape.num_patches, shape.width) == (16, 32 + 24)
    tower = load_tower(shape, 64, False, "cpu")
    pixels = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)]
    expected = [encoder.encode(own) for encoder, own in zip(tower.encoders, pixels, strict=True)]
    torch.testing.assert_close(tower.features(pixels), torch.cat(expected, -1))
    coarse = EncoderConfig(folder(tmp_path / "coarse", AutoModel.from_config(SiglipVisionConfig(**COARSE))))
    with pytest.raises(ConfigError, match="unequal numbers of patches"):
        MediaShape("image", ModalityConfig([VISION, coarse]))


def test_hash_tells_weights_and_processors_apart_but_not_places(tmp_path):
    torch.manual_seed(0)
    model = AutoModel.from_config(MODELS["siglip"][0])
    first, copy = (EncoderConfig(folder(tmp_path / name, model)) for name in ("a", "b"))
    assert encoder_fingerprint(first) == encoder_fingerprint(copy)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert encoder_fingerprint(EncoderConfig(folder(tmp_path / "c", model))) != encoder_fingerprint(first)
    assert encoder_fingerprint(replace(first, layer=-1)) != encoder_fingerprint(first)


def test_sounds_enter_by_the_same_path(tmp_path):
    """Reader, encoder and projector of Whisper features, beside images in one model."""
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_source_positions": 50}
    torch.manual_seed(0)
    model = AutoModel.from_config(WhisperConfig(**sizes, num_mel_bins=8))
    model.save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path / "whisper")
    sound = str(tmp_path / "a.wav")
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.sin(np.arange(8000) / 9) * 20000).astype("<i2").tobytes())
    projector = ProjectorConfig("perceiver", 3, hidden_size=16)
    audio = ModalityConfig([EncoderConfig(str(tmp_path / "whisper"), layer=-1)], projector)
    module = vlm_module(image=IMAGE, audio=audio)
    assert module.shapes["audio"].num_patches == 50
    content = [{"type": "audio", "audio": sound}, {"type": "text", "text": "order"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "repair"}]}
    data = vlm_data(module, [record])
    found = step_gradients(tmp_path, module, data)
    row = data.examples["train"][0]
    assert row["input_ids"].count(module.media["audio"].token_id) == 3
    assert any(name.startswith("towers.audio.projector.") and gradient.any() for name, gradient in found.items())


def test_imagebind_is_one_vector_and_needs_its_package():
    shape = MediaShape("image", ModalityConfig([EncoderConfig("imagebind")]))
    assert (shape.num_patches, shape.width, shape.number) == (1, 1024, 1)
    with pytest.raises(ConfigError, match="pip install --no-deps imagebind-packaged"):
        load_tower(shape, 64, False, "cpu")


def test_folder_without_a_processor_is_named(tmp_path):
    AutoModel.from_config(MODELS["siglip"][0]).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="bare: cannot load this model"):
        MediaShape("image", ModalityConfig([EncoderConfig(str(tmp_path / "bare"))]))
