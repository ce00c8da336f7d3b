"""Load a tokenizer and a language model as the configuration asks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from lit_alignment.errors import ConfigError
from lit_alignment.models.attention import Attention, choose_attention
from lit_alignment.paths import cache_dir


@dataclass(frozen=True)
class Backbone:
    """A pretrained language model and how to hold it.

    Args:
        path: A local folder, a name on the hub, or a name that `lit-alignment fetch` has put into the cache.
        revision: Branch, tag or commit on the hub.
        weights: `random` takes only the configuration from `path`, for tests and training from scratch.
        dtype: Precision of the frozen weights; `auto` is bfloat16 under adapters on a GPU, else float32.
            Trained adapters are always float32.
        attention: Implementation; `auto` picks the best that keeps packed documents apart.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third slower.
        compile: Compile the decoder with torch.compile.
        trust_remote_code: Run code that comes with the model.
    """

    path: str
    revision: str = "main"
    weights: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Attention = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    trust_remote_code: bool = False


def local_path(name: str) -> str:
    """Where a model's files are: a folder as it stands, a fetched copy in the cache, or the hub's own name.

    Raises:
        ConfigError: If the name can only be a folder, and there is none.
    """
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    fetched = cache_dir() / "models" / name.replace("/", "--")
    if (fetched / "config.json").is_file():
        return str(fetched)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name}: no such model folder (looked from {Path.cwd()}). Check backbone.path.")
    return name


def load_tokenizer(backbone: Backbone) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, with a pad token.

    Raises:
        ConfigError: If there is none.
    """
    tokenizer = _from_pretrained(AutoTokenizer, backbone)
    if tokenizer.pad_token_id is None:
        # Masking is by position, never by id, so padding with EOS hides no EOS.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_model(backbone: Backbone, peft: PeftConfig | None, packing: bool, device_type: str) -> nn.Module:
    """The language model, with fresh adapters if asked.

    Args:
        backbone: What to load.
        peft: Adapters to add; None trains all weights.
        packing: Whether it will see packed rows.
        device_type: Where it will run.

    Raises:
        ConfigError: If it cannot be loaded, or cannot be trained that way.
    """
    config = _from_pretrained(AutoConfig, backbone)
    options = {
        "attn_implementation": choose_attention(backbone.attention, packing, device_type, config),
        "dtype": _dtype(backbone, peft, device_type),
    }
    if backbone.weights == "random":
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = _from_pretrained(AutoModelForCausalLM, backbone, **options)
    if backbone.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if peft is not None:
            model.enable_input_require_grads()
    if backbone.compile:
        model.get_decoder().compile(dynamic=True)
    # transformers loads in eval mode, in which dropout and gradient checkpointing silently do nothing.
    network: nn.Module = model if peft is None else add_adapters(model, peft)
    return network.train()


def add_adapters(model: nn.Module, peft: PeftConfig) -> PeftModel:
    """Wrap a model in new adapters, whose weights are float32.

    Raises:
        ConfigError: If peft refuses the combination.
    """
    try:
        wrapped: PeftModel = get_peft_model(model, peft)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.peft: {error}") from error
    return wrapped


def _dtype(backbone: Backbone, peft: PeftConfig | None, device_type: str) -> torch.dtype:
    if backbone.dtype == "auto":
        return torch.bfloat16 if peft is not None and device_type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[backbone.dtype]


def _from_pretrained(loader: Any, backbone: Backbone, **options: Any) -> Any:
    path = local_path(backbone.path)
    try:
        return loader.from_pretrained(
            path, revision=backbone.revision, trust_remote_code=backbone.trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{backbone.path}: cannot load this model ({first}). Give a folder with config.json, tokenizer and "
            "weights, or a hub name that can be reached; `lit-alignment fetch --help` lists models that need no hub."
        ) from error


def decoder_flops_per_token(config: PretrainedConfig, num_parameters: int, num_trainable: int) -> float:
    """Floating-point operations to train one token: 2 per weight forward, 2 backward, and 2 for weight gradients.

    Attention scores are left out, as in the usual 6N rule. Source: Kaplan et al. 2020 (arXiv:2001.08361).
    """
    text = config.get_text_config()
    # The input embedding is a look-up; where it is tied it is also the output projection and counts once.
    lookup = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    return 4.0 * (num_parameters - lookup) + 2.0 * min(num_trainable, num_parameters - lookup)
