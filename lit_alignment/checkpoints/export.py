"""A checkpoint or an adapter as a plain Hugging Face folder, compared with the model that was trained."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from lit_alignment.checkpoints.card import model_card
from lit_alignment.checkpoints.comparing import (
    Difference,
    compare,
    encode_prompts,
    evaluating,
    logits,
    quiet,
    scores,
)
from lit_alignment.checkpoints.hf_folder import PARTIAL, Companions, Form, Written, export_form, write_folder
from lit_alignment.checkpoints.restore import Composed, restore, restore_towers
from lit_alignment.checkpoints.saved import Saved, read_saved
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.adapters import AdapterConfig, holding
from lit_alignment.models.dual_encoder import DUAL
from lit_alignment.models.loading import BackboneConfig, stored_dtype
from lit_alignment.models.multimodal.llava import composed_writer
from lit_alignment.models.multimodal.modality import MediaShape, MediaTower, save_towers
from lit_alignment.models.stop_rule import StopRule, generation_config, read_generation_config, stop_rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of a logit, as a share of the largest logit: rounding of the stored weights, and nothing else,
# since both sides compute in float32.
WRITTEN = {".json", ".safetensors", ".jinja", ".txt", ".model", ".md"}  # what an export consists of
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class ExportParts:
    """What a folder holds besides the weights and the tokenizer of a language model.

    Args:
        generation_config: Under which a loaded model stops where it was trained to; None for one that scores.
        beside: Writes what else belongs into the folder.
        full_weights: Writes full or merged weights, given by name, in another form than the model's own.
        note: What the user should know of it.
        composed: What reads images, where they are a part of the written model.
    """

    generation_config: GenerationConfig | None = None
    beside: Callable[[Path], None] | None = None
    full_weights: Callable[[Path, dict[str, Tensor]], None] | None = None
    note: str = ""
    composed: Composed | None = None

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
        trust_remote_code: Run code that comes with the base model.
        name: What its card calls the model; by default the folder.
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
    trust_remote_code: bool = False
    name: str | None = None


def export(config: ExportConfig) -> None:
    """Export, compare the logits before and after, and print the largest difference.

    Raises:
        ConfigError: If the folder exists, or the source cannot be written as asked.
        CheckpointError: If the difference is past the tolerance; nothing is written then.
    """
    target = config.out
    _check_target(config)
    saved = read_saved(config.source, config.base, config.trust_remote_code)
    network, tokenizer = restore(saved)
    composed = restore_towers(saved, network) if saved.modalities else None
    parts = _parts(config, saved, network, tokenizer, composed)
    form = _form(config, saved, network, parts)
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else _dtype(saved, form)
    card = model_card(saved, form, config.name or target.name, parts.merges)
    companions = Companions(
        tokenizer, parts.generation_config, saved.chat_template, parts.beside, parts.full_weights, card
    )
    check = Check(encode_prompts(tokenizer, config.prompts), config.tolerance, config.max_shard_size, dtype)
    difference = write_checked(network, replace(saved, trained={}), target, companions, parts, form, check)
    what = "logits" if saved.head is None else "scores"
    images = ", without and with images" if parts.merges else ""
    print(f"{what} before and after on {len(check.prompts)} prompts{images}: {difference}")
    size = sum(file.stat().st_size for file in target.iterdir())
    stored = "" if form == "adapter" else f", {str(dtype).removeprefix('torch.')}"
    print(f"{'LLaVA' if parts.merges else form}: {target}  ({size / 1e6:.1f} MB{stored})")


def _check_target(config: ExportConfig) -> None:
    """Refuse to write where something stands that an export has not written.

    Raises:
        ConfigError: Saying what.
    """
    target, given = config.out, [config.source, Path(config.base or config.source), Path.cwd()]
    if (target.exists() or target.is_symlink()) and not config.overwrite:
        raise ConfigError(f"{target} exists. Choose another --out, or add --overwrite.")
    if target.is_symlink() or target.is_file():
        raise ConfigError(f"{target} is a link or a file, which --overwrite does not replace. Choose another --out.")
    whole = target.resolve()
    if any(whole == path.resolve() or whole in path.resolve().parents for path in given):
        raise ConfigError(f"{target} holds what is exported, or where you are. Choose another --out.")
    foreign = next((path.name for path in target.glob("*") if path.suffix not in WRITTEN and path.is_file()), None)
    if foreign is not None:
        raise ConfigError(f"{target} holds {foreign}, which no export has written. Choose another --out, or remove it.")


@dataclass(frozen=True)
class Check:
    """How a folder is written and compared with the model.

    Args:
        prompts: Token ids of what both are asked.
        tolerance: Largest difference of a logit, as a share of the largest one; by default that of the precision.
        max_shard_size: Largest file of weights.
        dtype: Precision of full or merged weights; by default each keeps its own.
        loaded: Precision in which the folder is loaded.
    """

    prompts: list[list[int]]
    tolerance: float | None = None
    max_shard_size: str = "5GB"
    dtype: torch.dtype | None = None
    loaded: torch.dtype = torch.float32


def write_checked(
    network: nn.Module,
    saved: Saved,
    target: Path,
    companions: Companions,
    parts: ExportParts,
    form: Written,
    check: Check,
) -> Difference:
    """Write a folder, load it as a user would, and let it take its place if it answers as the model does.

    Args:
        network: The model.
        saved: The checkpoint, whose weights count instead of the live ones.
        target: The folder; one that is there stays until the new one has been compared.
        companions: What stands beside the weights.
        parts: What the method writes besides.
        form: What to write.
        check: How to compare.

    Raises:
        CheckpointError: If the folder cannot be written, or answers differently; nothing is left of it then.
    """
    fresh = target.with_name(f".{target.name}.checked{PARTIAL}")
    images = parts.merges and parts.composed is not None and parts.composed.reads_images
    try:
        with holding(network, saved.trained), evaluating(network), quiet():
            before = _answers(network, check.prompts, saved.head is not None)
            if images and parts.composed is not None:
                before += parts.composed.logits_with_images(network, companions.tokenizer, check.prompts)
            write_folder(network, {}, fresh, companions, form, check.max_shard_size, check.dtype)
        with quiet():
            model = reload(fresh, form, saved, parts.merges, check.loaded)
        after = logits(model, check.prompts)
        if images and parts.composed is not None:
            after += parts.composed.logits_of_llava(model, companions.tokenizer, check.prompts)
        difference = compare(before, after)
        precisions = {check.dtype, check.loaded, next(network.parameters()).dtype}
        usual = max(TOLERANCE[each] for each in precisions if each in TOLERANCE)
        tolerance = usual if check.tolerance is None else check.tolerance
        if not difference.share <= tolerance:  # also where it is non-finite
            raise CheckpointError(
                f"{target}: not written: the exported model answers differently than the trained one ({difference}; "
                f"allowed is {tolerance:g} of the largest logit). Try --dtype float32, which rounds least."
            )
        if target.exists():
            shutil.rmtree(target)
        os.replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return difference


def _answers(network: nn.Module, prompts: list[list[int]], scoring: bool) -> list[Tensor]:
    return [scores(network, prompt) for prompt in prompts] if scoring else logits(network, prompts)


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
    return replace(parts, generation_config=stops)


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
        return ExportParts(full_weights=full_weights, composed=Composed(shapes, towers, trained))
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
    stored = stored_dtype(saved.backbone) if form == "merged" else None
    return stored or torch.float32


def _generation_config(saved: Saved, source: Path, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig | None:
    if saved.head is not None:
        return None
    if saved.stop is not None:
        return generation_config(tokenizer, StopRule(**saved.stop))
    return read_generation_config(source) or generation_config(tokenizer, stop_rule(tokenizer, []))


def _write_towers(towers: dict[str, MediaTower], trained: dict[str, Tensor], folder: Path) -> None:
    save_towers(towers, folder / "media", trained)


def reload(folder: Path, form: str, saved: Saved, llava: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The written folder as a user would load it, on the CPU.

    Args:
        folder: The folder.
        form: What was written.
        saved: What it was written from.
        llava: Whether it is a LLaVA.
        dtype: Precision to load it in.
    """
    if llava:
        composed: nn.Module = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return composed.eval()
    if form != "adapter":
        kind: Any = AutoModelForCausalLM if saved.head is None else AutoModelForSequenceClassification
        model: nn.Module = kind.from_pretrained(folder, dtype=dtype, trust_remote_code=saved.backbone.trust_remote_code)
        return model.eval()
    base = saved.backbone
    alone = Saved(
        BackboneConfig(base.path, base.revision, str(folder), trust_remote_code=base.trust_remote_code),
        None, AdapterConfig(str(folder)), saved.tokens, {}, None, None, saved.head,
    )  # fmt: skip
    return restore(alone, dtype)[0]
