"""`lit-alignment export` and `merge`: a checkpoint or an adapter as a plain Hugging Face folder, checked."""

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

from lit_alignment.checkpoints.hf_folder import PARTIAL, Companions, Written, export_form, write_folder
from lit_alignment.checkpoints.restore import Composed, Saved, read_saved, restore, restore_towers
from lit_alignment.data.encoding.encoder import Dropped, Encoder, EncodingConfig
from lit_alignment.data.encoding.messages import read_record
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.head import scores_at
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.multimodal.llava import composed_writer
from lit_alignment.models.multimodal.modality import MediaTower, save_towers
from lit_alignment.models.stop_rule import StopRule, generation_config, stop_rule
from lit_alignment.paths import local_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of a logit, as a share of the largest logit: rounding of the stored weights, and nothing else,
# since both sides compute in float32.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
TEXTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "Explain to a child why the sky is blue, in two sentences.",
)
NUM_PROMPTS = 16


def main(arguments: list[str], merge: bool = False) -> None:
    """Export, compare the logits before and after, and print the largest difference.

    Raises:
        CheckpointError: If the difference is past the tolerance; nothing is written then.
    """
    options = _parser(merge).parse_args(arguments)
    target: Path = options.out
    if target.exists() and not options.overwrite:
        raise ConfigError(f"{target} exists. Choose another --out, or add --overwrite.")
    saved = read_saved(options.source, options.base)
    network, tokenizer = restore(saved)
    composed = restore_towers(saved, network) if saved.modalities else None
    form, full_weights = _form(options, merge, saved, network, tokenizer, composed)
    dtype = DTYPES[options.dtype] if options.dtype != "auto" else _dtype(saved, form)

    prompts = encode_prompts(tokenizer, options.prompts)
    before = logits(network, prompts) if saved.head is None else [scores(network, prompt) for prompt in prompts]
    if full_weights is not None and composed is not None:
        before += composed.logits_with_images(network, tokenizer, prompts)
    fresh = target.with_name(f".{target.name}.checked{PARTIAL}")
    companions = Companions(
        tokenizer,
        _generation_config(saved, options.source, tokenizer),
        saved.chat_template,
        beside=None if composed is None or full_weights else partial(_write_towers, composed.towers),
        full_weights=full_weights,
    )
    write_folder(network, {}, fresh, companions, form, options.max_shard_size, dtype)
    try:
        model = reload(fresh, form, saved, full_weights is not None)
        after = logits(model, prompts)
        if full_weights is not None and composed is not None:
            after += composed.logits_of_llava(model, tokenizer, prompts)
        difference = compare(before, after)
        tolerance = options.tolerance if options.tolerance is not None else TOLERANCE[dtype]
        what = "logits" if saved.head is None else "scores"
        images = ", without and with images" if full_weights is not None else ""
        print(f"{what} before and after on {len(prompts)} prompts{images}: {difference}")
        if not difference.share <= tolerance:  # also where it is no number
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
    print(f"{'LLaVA' if full_weights else form}: {target}  ({size / 1e6:.1f} MB{stored})")


def _form(
    options: argparse.Namespace,
    merge: bool,
    saved: Saved,
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    composed: Composed | None,
) -> tuple[Written, Callable[[Path, dict[str, Tensor]], None] | None]:
    """What is written, and what writes it if that is not the model itself; says why, where that is not as asked.

    Raises:
        ConfigError: If it cannot be as asked.
    """
    form, reason = export_form(network, "merged" if merge else options.form)
    if merge and form == "full":
        raise ConfigError(f"{options.source}: nothing to merge, this checkpoint has no adapters. Use export.")
    full_weights = None
    if composed is not None:
        parts = composed.shapes, composed.towers, saved.towers, network, tokenizer, saved.chat_template
        full_weights, other = composed_writer(*parts)
        if not merge and options.form == "adapter":
            full_weights, other = None, "the form is adapter"
        if full_weights is None:
            print(f"no LLaVA folder, since {other}; the projectors are written to media/")
        elif form == "adapter":
            form, reason = "merged", ""
    if form == "merged" and saved.backbone.quantization != "none" and not options.dequantize:
        raise ConfigError(
            f"{options.source} was trained over {saved.backbone.quantization} weights. Merged into the unquantised "
            "ones it is another model than was trained. Export it with --form adapter, or accept that: --dequantize."
        )
    if saved.retriever:
        print("the generator alone: the retriever is written by the callback lit_alignment.Export")
    if reason:
        print(f"merged, since {reason}, which servers such as vLLM cannot load beside the base")
    return form, full_weights


def _parser(merge: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"lit-alignment {'merge' if merge else 'export'}",
        description="Write a folder that from_pretrained and servers load, and compare its logits with the trained "
        "model's. Adapters are merged in float32 and cast once.",
    )
    parser.add_argument("source", type=Path, help="a .ckpt file, the folder of a sharded checkpoint, or of an adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--base", help="the base model, if it is not where the source says")
    if not merge:
        parser.add_argument("--form", choices=["auto", "merged", "adapter"], default="auto")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: that of the base's files")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--prompts", type=Path, help="chat records to compare on; a few questions by default")
    parser.add_argument("--tolerance", type=float, help="largest difference, as a share of the largest logit")
    parser.add_argument("--dequantize", action="store_true", help="merge what was trained over quantised weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser


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


def encode_prompts(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> list[list[int]]:
    """Token ids of the prompts to compare on: records of a file, or a few questions."""
    if tokenizer.chat_template is None:
        if file is not None:
            raise ConfigError(f"{tokenizer.name_or_path} has no chat template to render {file} with.")
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    questions = [(f"[{i}]", {"messages": [{"role": "user", "content": text}]}) for i, text in enumerate(TEXTS)]
    records = SourceConfig(str(file)).read() if file is not None else iter(questions)
    encoder = Encoder(tokenizer, EncodingConfig())
    prompts: list[list[int]] = []
    for position, (where, raw) in enumerate(records):
        try:
            prompts.append(encoder.encode_prompt(read_record(raw, where, position)).input_ids)
        except Dropped as drop:
            print(f"{where}: not compared ({drop.reason})")
        if len(prompts) == NUM_PROMPTS:
            break
    if not prompts:
        raise ConfigError(f"{file}: no record to compare on.")
    return prompts


@torch.no_grad()
def logits(network: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """Logits after each prompt's tokens, [T, V] each, or transformers' own scores of it, [1, K]."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        # A classifier has one row of scores a sequence, a language model one a token; prompt learning adds some before.
        found.append(output.float() if output.ndim == 2 else output[0, -len(prompt) :].float())
    return found


@torch.no_grad()
def scores(network: nn.Module, prompt: list[int]) -> Tensor:
    """A classifier's scores of a prompt's last token, [1, K], as they were in training: by place, not by padding."""
    ids = torch.tensor([prompt])
    return scores_at(network, torch.tensor([len(prompt) - 1]), input_ids=ids, attention_mask=torch.ones_like(ids))


def _write_towers(towers: dict[str, MediaTower], folder: Path) -> None:
    save_towers(towers, folder / "media", {})


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


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart.

    Args:
        largest: Largest absolute difference of a logit.
        scale: Largest absolute logit.
        agreement: Share of positions with the same most likely token.
    """

    largest: float
    scale: float
    agreement: float

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest / self.scale

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.3g} ({self.share:.2g} of the largest logit), "
            f"same top token at {self.agreement:.1%} of positions"
        )


def compare(before: list[Tensor], after: list[Tensor]) -> Difference:
    """The difference over all prompts; padding rows of the vocabulary that only one side has are left out."""
    width = min(before[0].shape[1], after[0].shape[1])
    pairs = [(a[:, :width], b[:, :width]) for a, b in zip(before, after, strict=True)]
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return Difference(
        largest=max(float((a - b).abs().max()) for a, b in pairs),
        scale=max(float(a.abs().max()) for a, _ in pairs),
        agreement=agreeing / sum(len(a) for a, _ in pairs),
    )
