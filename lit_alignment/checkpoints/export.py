"""A checkpoint or an adapter as a plain Hugging Face folder, compared with the model that was trained."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from lit_alignment.checkpoints.comparing import compare, encode_prompts, logits, scores
from lit_alignment.checkpoints.hf_folder import PARTIAL, Companions, Form, Written, export_form, write_folder
from lit_alignment.checkpoints.restore import Composed, Saved, read_saved, restore, restore_towers
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.dual_encoder import DUAL
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.multimodal.llava import composed_writer
from lit_alignment.models.multimodal.modality import MediaShape, MediaTower, save_towers
from lit_alignment.models.stop_rule import StopRule, generation_config, stop_rule
from lit_alignment.paths import local_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of a logit, as a share of the largest logit: rounding of the stored weights, and nothing else,
# since both sides compute in float32.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class ExportParts:
    """What a folder holds besides the weights and the tokenizer of a language model.

    Args:
        generation_config: Under which a loaded model stops where it was trained to; None for one that scores.
        beside: Writes what else belongs into the folder.
        full_weights: Writes full or merged weights, given by name, in another form than the model's own.
        note: What the user should know of it.
    """

    generation_config: GenerationConfig | None = None
    beside: Callable[[Path], None] | None = None
    full_weights: Callable[[Path, dict[str, Tensor]], None] | None = None
    note: str = ""

    @property
    def merges(self) -> bool:
        """Whether adapters have to be merged for it."""
        return self.full_weights is not None


@dataclass(frozen=True)
class ExportConfig:
    """How a checkpoint is exported.

    Args:
        source: A checkpoint file, the folder of a sharded checkpoint, or of an adapter.
        out: The folder to write.
        base: The base model, if it is not where the source says.
        form: For adapters: write them alone or merged; `auto` merges those that servers cannot load beside the base.
        must_merge: Refuse a source without adapters.
        dtype: Precision of full or merged weights; `auto` is that of the base's files.
        max_shard_size: Largest file of weights.
        prompts: Chat records to compare on; a few questions by default.
        tolerance: Largest difference of a logit, as a share of the largest one.
        dequantize: Merge what was trained over quantised weights.
        overwrite: Replace the folder if it exists.
    """

    source: Path
    out: Path
    base: str | None = None
    form: Form = "auto"
    must_merge: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_shard_size: str = "5GB"
    prompts: Path | None = None
    tolerance: float | None = None
    dequantize: bool = False
    overwrite: bool = False


def export(config: ExportConfig) -> None:
    """Export, compare the logits before and after, and print the largest difference.

    Raises:
        ConfigError: If the folder exists, or the source cannot be written as asked.
        CheckpointError: If the difference is past the tolerance; nothing is written then.
    """
    target = config.out
    if target.exists() and not config.overwrite:
        raise ConfigError(f"{target} exists. Choose another --out, or add --overwrite.")
    saved = read_saved(config.source, config.base)
    network, tokenizer = restore(saved)
    composed = restore_towers(saved, network) if saved.modalities else None
    parts = _parts(config, saved, network, tokenizer, composed)
    form = _form(config, saved, network, parts)
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else _dtype(saved, form)
    prompts = encode_prompts(tokenizer, config.prompts)
    before = logits(network, prompts) if saved.head is None else [scores(network, prompt) for prompt in prompts]
    if parts.merges and composed is not None:
        before += composed.logits_with_images(network, tokenizer, prompts)
    fresh = target.with_name(f".{target.name}.checked{PARTIAL}")
    stops, template = parts.generation_config, saved.chat_template
    companions = Companions(tokenizer, stops, template, parts.beside, parts.full_weights)
    write_folder(network, {}, fresh, companions, form, config.max_shard_size, dtype)
    try:
        model = reload(fresh, form, saved, parts.merges)
        after = logits(model, prompts)
        if parts.merges and composed is not None:
            after += composed.logits_of_llava(model, tokenizer, prompts)
        difference = compare(before, after)
        tolerance = config.tolerance if config.tolerance is not None else TOLERANCE[dtype]
        what = "logits" if saved.head is None else "scores"
        images = ", without and with images" if parts.merges else ""
        print(f"{what} before and after on {len(prompts)} prompts{images}: {difference}")
        if not difference.share <= tolerance:  # also where it is non-finite
            raise CheckpointError(
                f"{target}: not written: the exported model answers differently than the trained one ({difference}; "
                f"allowed is {tolerance:g} of the largest logit). Try --dtype float32, or raise --tolerance."
            )
        if target.exists():
            shutil.rmtree(target)
        os.replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    stored = "" if form == "adapter" else f", {str(dtype).removeprefix('torch.')}"
    print(f"{'LLaVA' if parts.merges else form}: {target}  ({size / 1e6:.1f} MB{stored})")


def _parts(
    config: ExportConfig,
    saved: Saved,
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    composed: Composed | None,
) -> ExportParts:
    """What is written beside the language model; says so, where that is not all there is."""
    stops = _generation_config(saved, config.source, tokenizer)
    if DUAL in saved.networks:
        print("the generator alone: the retriever is written by the callback lit_alignment.Export")
    if composed is None:
        return ExportParts(stops)
    parts = media_parts(composed.shapes, composed.towers, {}, network, tokenizer, saved.chat_template, config.form)
    if parts.note:
        print(parts.note)
    return ExportParts(stops, parts.beside, parts.full_weights)


def media_parts(
    shapes: dict[str, MediaShape],
    towers: dict[str, MediaTower],
    trained: dict[str, Tensor],
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: str | dict[str, str] | None,
    form: Form,
) -> ExportParts:
    """A composed model as a LLaVA if it can be one, else its projectors beside the language model, in `media/`.

    Args:
        shapes: Its modalities.
        towers: Their encoders and projectors.
        trained: A checkpoint's weights to write instead of the towers' live ones, by name.
        network: The language model.
        tokenizer: With the placeholders.
        template: The Jinja template that training used.
        form: What was asked for; an adapter alone is no LLaVA.
    """
    full_weights, reason = composed_writer(shapes, towers, trained, network, tokenizer, template)
    if form == "adapter":
        full_weights, reason = None, "the form is adapter"
    if full_weights is not None:
        return ExportParts(full_weights=full_weights)
    note = f"no LLaVA folder, since {reason}; the projectors are written to media/"
    return ExportParts(beside=partial(_write_towers, towers, trained), note=note)


def _form(config: ExportConfig, saved: Saved, network: nn.Module, parts: ExportParts) -> Written:
    """What is written; says why, where that is not as asked.

    Raises:
        ConfigError: If it cannot be as asked.
    """
    form, reason = export_form(network, config.form)
    if config.must_merge and form == "full":
        raise ConfigError(f"{config.source}: nothing to merge, this checkpoint has no adapters. Use export.")
    if parts.merges and form == "adapter":
        form, reason = "merged", ""
    if form == "merged" and saved.backbone.quantization != "none" and not config.dequantize:
        raise ConfigError(
            f"{config.source} was trained over {saved.backbone.quantization} weights. Merged into the unquantised "
            "ones it is another model than was trained. Export it with --form adapter, or accept that: --dequantize."
        )
    if reason:
        print(f"merged, since {reason}, which servers such as vLLM cannot load beside the base")
    return form


def _dtype(saved: Saved, form: str) -> torch.dtype:
    """Merged weights are stored as the base's files are, trained ones as they were trained."""
    if form == "full" and saved.backbone.dtype in DTYPES:
        return DTYPES[saved.backbone.dtype]
    stored = AutoConfig.from_pretrained(local_path(saved.backbone.path)).dtype if form == "merged" else None
    return stored or torch.float32


def _generation_config(saved: Saved, source: Path, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig | None:
    if saved.head is not None:
        return None
    if saved.stop is not None:
        return generation_config(tokenizer, StopRule(**saved.stop))
    if (source / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(source)
    return generation_config(tokenizer, stop_rule(tokenizer, []))


def _write_towers(towers: dict[str, MediaTower], trained: dict[str, Tensor], folder: Path) -> None:
    save_towers(towers, folder / "media", trained)


def reload(folder: Path, form: str, saved: Saved, llava: bool = False) -> nn.Module:
    """The written folder as a user would load it, computing in float32."""
    if llava:
        composed: nn.Module = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return composed.eval()
    if form != "adapter":
        kind: Any = AutoModelForCausalLM if saved.head is None else AutoModelForSequenceClassification
        model: nn.Module = kind.from_pretrained(folder, dtype=torch.float32)
        return model.eval()
    alone = Saved(
        BackboneConfig(saved.backbone.path, saved.backbone.revision, tokenizer=str(folder)),
        None, AdapterConfig(str(folder)), saved.tokens, {}, None, None, saved.head,
    )  # fmt: skip
    return restore(alone)[0]
