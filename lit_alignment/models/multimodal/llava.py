"""A composed model as a LLaVA folder, which transformers and servers load."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, LlavaConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lit_alignment.models.head import base_model
from lit_alignment.models.multimodal.modality import MediaShape, MediaTower, tower_state
from lit_alignment.models.multimodal.projectors import MLP
from lit_alignment.models.multimodal.vision import VisionEncoder, load_encoder

ENCODERS = ("clip_vision_model", "siglip_vision_model")
HAS_CLASS_TOKEN = ("clip_vision_model",)
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")


def why_not_llava(
    shapes: dict[str, MediaShape], encoder: nn.Module | None, projector: nn.Module, text: PretrainedConfig
) -> str:
    """What keeps a composed model from being a LLaVA, or "" if nothing does.

    Args:
        shapes: Its modalities.
        encoder: The image encoder, or None if there are several.
        projector: The image projector.
        text: Configuration of the language model.
    """
    if list(shapes) != ["image"]:
        return f"it takes {' and '.join(shapes)}"
    modality = shapes["image"].modality
    if not isinstance(encoder, VisionEncoder) or encoder.model.config.model_type not in ENCODERS:
        return "its encoder is not one of CLIP or SigLIP"
    if not isinstance(projector, MLP) or len(projector) != 3:
        return "its projector is not an mlp of depth 2"
    if modality.start or modality.end:
        return "servers would not put its start and end tokens around an image"
    if text.model_type not in LANGUAGE_MODELS:
        return f"its language model is a {text.model_type}"
    return ""


def llava_config(shape: MediaShape, vision: PretrainedConfig, text: PretrainedConfig, token_id: int) -> LlavaConfig:
    """The configuration of the same model as a LLaVA.

    Args:
        shape: The image modality.
        vision: Configuration of the image encoder.
        text: Configuration of the language model.
        token_id: The placeholder.
    """
    encoder = shape.modality.encoders[0]
    drops_first = vision.model_type in HAS_CLASS_TOKEN and not encoder.keep_cls
    return LlavaConfig(
        vision_config=AutoConfig.for_model(**vision.to_dict()),
        text_config=AutoConfig.for_model(**text.to_dict()),
        image_token_index=token_id,
        image_seq_length=shape.number,
        projector_hidden_act="gelu",
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy="default" if drops_first else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=text.dtype,
    )


def llava_state(language: dict[str, Tensor], vision: dict[str, Tensor], projector: dict[str, Tensor]) -> dict[str, Any]:
    """Weights under the names that servers and transformers both read.

    Args:
        language: The causal language model's, as transformers names them.
        vision: The image encoder's.
        projector: The projector's: layers 0 and 2 of an MLP.
    """
    state = {f"language_model.{name}": value for name, value in language.items()}
    state |= {f"vision_tower.vision_model.{name}": value for name, value in vision.items()}
    numbers = {"0": "linear_1", "2": "linear_2"}
    for name, value in projector.items():
        layer, _, part = name.partition(".")
        state[f"multi_modal_projector.{numbers[layer]}.{part}"] = value
    return state


def write_llava(
    folder: Path,
    config: LlavaConfig,
    state: dict[str, Tensor],
    image_processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    token: str,
    max_shard_size: str = "5GB",
) -> None:
    """Write configuration, weights and processor into a folder.

    Args:
        folder: An existing folder.
        config: Of `llava_config`.
        state: Of `llava_state`.
        image_processor: Of the encoder.
        tokenizer: Of the language model, with the placeholder.
        token: The placeholder.
        max_shard_size: Largest file of weights.
    """
    from transformers import LlavaProcessor

    config.save_pretrained(folder)
    state = {name: value.contiguous().cpu() for name, value in state.items()}
    if config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=token,
        num_additional_image_tokens=int(config.vision_config.model_type in HAS_CLASS_TOKEN),
    )
    processor.save_pretrained(folder)


def composed_writer(
    shapes: dict[str, MediaShape],
    towers: dict[str, MediaTower],
    trained: dict[str, Tensor],
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | dict[str, str] | None,
) -> tuple[Callable[[Path, dict[str, Tensor]], None] | None, str]:
    """What writes a composed model as a LLaVA, given the language model's weights, or why it cannot be one.

    Args:
        shapes: Its modalities.
        towers: Their encoders and projectors; encoders are loaded here if features came from a cache.
        trained: A checkpoint's weights to write instead of the live ones, by name in the towers.
        network: The language model.
        tokenizer: With the placeholder.
        chat_template: The Jinja template that training used.
    """
    if "image" not in shapes:
        return None, f"it takes {' and '.join(shapes)}"
    shape, tower = shapes["image"], towers["image"]
    encoders: list[nn.Module] = list(tower.encoders)
    if not encoders and len(shape.modality.encoders) == 1:
        encoders = [load_encoder(shape.modality.encoders[0], "image", False, "cpu")]
    encoder = encoders[0] if len(encoders) == 1 else None
    text = base_model(network).config
    reason = why_not_llava(shapes, encoder, tower.projector, text)
    if reason or not isinstance(encoder, VisionEncoder):
        return None, reason
    found: VisionEncoder = encoder

    def write(folder: Path, language: dict[str, Tensor]) -> None:
        vision = tower_state(found.model, "image.encoders.0.model.", trained)
        projector = tower_state(tower.projector, "image.projector.", trained)
        token = shape.modality.placeholder("image")
        dtype = language[next(iter(language))].dtype
        state = llava_state(language, vision, projector)
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        token_id = int(tokenizer.convert_tokens_to_ids(token))
        config = llava_config(shape, found.model.config, text, token_id)
        config.dtype = dtype
        own = copy.deepcopy(tokenizer)
        own.chat_template = chat_template or tokenizer.chat_template
        write_llava(folder, config, state, shape.processors[0], own, token)

    return write, ""
