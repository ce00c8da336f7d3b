"""Write a model or an adapter as a Hugging Face folder, whole or not at all."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_alignment.errors import CheckpointError
from lit_alignment.models.adapters import cast, holding, merged_state, save_adapter, why_merge
from lit_alignment.models.head import base_model

PARTIAL = ".partial"
Form = Literal["auto", "merged", "adapter"]
Written = Literal["merged", "adapter", "full"]


@dataclass(frozen=True)
class Companions:
    """What a folder holds besides weights.

    Args:
        tokenizer: The tokenizer.
        generation_config: Under which a loaded model stops where it was trained to; None for one that scores.
        chat_template: The Jinja template that training used; None leaves the tokenizer's own.
        beside: Writes what else belongs into the folder.
        full_weights: Writes full or merged weights, given by name, in another form than the model's own.
        card: README.md; empty for none.
    """

    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig | None
    chat_template: str | dict[str, str] | None = None
    beside: Callable[[Path], None] | None = None
    full_weights: Callable[[Path, dict[str, Tensor]], None] | None = None
    card: str = ""


def export_form(network: nn.Module, form: Form) -> tuple[Written, str]:
    """The form in which a model is written, and why, where `auto` had to choose merging."""
    if not isinstance(network, PeftModel):
        return "full", ""
    if form != "auto":
        return form, ""
    reason = why_merge(network)
    return ("merged", reason) if reason else ("adapter", "")


def write_folder(
    network: nn.Module,
    trained: dict[str, Tensor],
    target: Path,
    companions: Companions,
    form: Written,
    max_shard_size: str = "5GB",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a folder that `from_pretrained` loads; one that is there is replaced when the new one is complete.

    Args:
        network: The model; its live weights are left as they are.
        trained: Trained weights to write instead of the live ones, by name in the network.
        target: The folder.
        companions: Tokenizer, generation config and template.
        form: What to write, as `export_form` has chosen.
        max_shard_size: Largest file of weights.
        dtype: Precision of full or merged weights; by default that of the model.

    Raises:
        CheckpointError: If the disk is full or the folder cannot be written.
    """
    partial = target.with_name(f".{target.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with holding(network, trained):
            _write_weights(network, partial, form, max_shard_size, dtype, companions.full_weights)
        tokenizer = copy.copy(companions.tokenizer)
        tokenizer.chat_template = companions.chat_template or tokenizer.chat_template
        tokenizer.save_pretrained(partial)
        if companions.generation_config is not None:
            companions.generation_config.save_pretrained(partial)
        if companions.beside is not None:
            companions.beside(partial)
        if companions.card:
            (partial / "README.md").write_text(companions.card, encoding="utf-8")
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        flush_folder(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{target}: cannot write the export ({error}). The checkpoint is untouched.") from error
    return target


def _write_weights(
    network: nn.Module,
    folder: Path,
    form: Written,
    max_shard_size: str,
    dtype: torch.dtype | None,
    full_weights: Callable[[Path, dict[str, Tensor]], None] | None,
) -> None:
    model = base_model(network)
    if isinstance(network, PeftModel) and form == "adapter":
        save_adapter(network, folder)
        if model.get_output_embeddings() is None:  # a classifier's labels
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
        return
    if isinstance(network, PeftModel):
        state = merged_state(network, dtype)
    else:
        state = {name: cast(value, dtype) for name, value in network.state_dict().items()}
    with _tied_as_trained(model, state):
        if full_weights is not None:
            full_weights(folder, state)
            return
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        if dtype is not None:
            config = copy.deepcopy(model.config)
            config.dtype = dtype
            config.save_pretrained(folder)


@contextmanager
def _tied_as_trained(model: PreTrainedModel, state: dict[str, Tensor]) -> Iterator[None]:
    """Have tied embeddings written once, or untied, in weights and configuration, where an adapter made two of them."""
    output, configs = model.get_output_embeddings(), [model.config, model.config.get_text_config()]
    if output is None or not configs[1].tie_word_embeddings:
        yield
        return
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (f"{names[id(module)]}.weight" for module in (model.get_input_embeddings(), output))
    if torch.equal(state[embedding], state[head]):
        state[head] = state[embedding]
        yield
        return
    tied = [config.tie_word_embeddings for config in configs]
    try:
        for config in configs:
            config.tie_word_embeddings = False
        yield
    finally:
        for config, value in zip(configs, tied, strict=True):
            config.tie_word_embeddings = value


def flush_folder(path: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
