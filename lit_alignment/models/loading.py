"""Load a tokenizer and a language model as the configuration asks."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import constants, try_to_load_from_cache
from peft import PeftConfig, PeftModel, PrefixTuningConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from lit_alignment.errors import AlignmentError, ConfigError, require
from lit_alignment.files import check_descriptions, check_folder, read_json
from lit_alignment.models.adapters import AdapterConfig, add_adapters, is_prompt_learning, load_adapter
from lit_alignment.models.attention import Attention, choose_attention, known_attentions, lacks_ours
from lit_alignment.models.head import SCORE, output_head
from lit_alignment.models.layers import Checkpointing, LayerConfig, Selective, set_layers
from lit_alignment.models.liger import apply_liger
from lit_alignment.models.quantization import Quantization, keep_differentiable, quantized
from lit_alignment.models.tokens import TokensConfig, add_tokens, fit_vocabulary
from lit_alignment.moved import renamed
from lit_alignment.paths import local_path, look_for_hub, suggestion

FETCH = "`lit-alignment fetch --help` lists models that need no hub."


@dataclass(frozen=True)
class BackboneConfig:
    """A pretrained language model and how to hold it.

    Args:
        path: A local folder, a name on the hub, or a name that `lit-alignment fetch` has put into the cache.
        revision: Branch, tag or commit of `path` on the hub; the commit is written into checkpoints and exports.
        tokenizer: Where the tokenizer is, if not beside the weights; an exported adapter's folder, for one.
        weights: `random` takes only the configuration from `path`, for tests and training from scratch.
        dtype: Precision of the frozen weights; `auto` is bfloat16 under adapters on a GPU, else float32.
            Trained adapters are always float32.
        attention: Implementation; `auto` picks the best that keeps packed documents apart.
        gradient_checkpointing: Recompute activations in the backward pass: `full` (or true) takes the least memory and
            about a third more time, `selective` lies between that and `none` (or false).
        selective: What `selective` recomputes: every n-th layer, or all layers but for their attention.
        activation_offload: Hold what `full` checkpointing keeps in the host's memory.
        compile: Compile each decoder layer with torch.compile; packed rows are then filled up to one length.
        liger: Use Liger's fused kernels for rotary positions, norms and MLP, on a GPU; the loss stays ours.
        quantization: Hold the frozen weights in 4 bits (`nf4`, QLoRA) or 8 (`int8`), under adapters.
        trust_remote_code: Run code that comes with the model.
    """

    path: str
    revision: str = "main"
    tokenizer: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Attention = "auto"
    gradient_checkpointing: bool | Checkpointing = "none"
    selective: Selective = "save_attention"
    activation_offload: bool = False
    compile: bool = False
    liger: bool = False
    quantization: Quantization = "none"
    trust_remote_code: bool = False

    @property
    def checkpointing(self) -> Checkpointing:
        """What is recomputed, where `gradient_checkpointing` may be a boolean."""
        given = self.gradient_checkpointing
        return given if isinstance(given, str) else "full" if given else "none"

    @property
    def layers(self) -> LayerConfig:
        """What is done with each decoder layer.

        Raises:
            ConfigError: If these settings do not go together.
        """
        return LayerConfig(self.compile, self.checkpointing, self.selective, self.activation_offload)


Loaded = TypeVar("Loaded", bound=Any)  # a dataclass with `path` and `revision`


@dataclass(frozen=True)
class HeadConfig:
    """A layer that turns the last hidden state of a sequence into scores, in place of the output embedding.

    Args:
        labels: What the scores are of, in order.
        problem: `single_label`, `multi_label` or `regression`; a reward is the regression of one quantity.
        pad: The padding token, by which transformers finds the last token of a row.
        measured: What was measured with the trained model, by name: `calibration_temperature`, `reward_mean`,
            `reward_std`. It is written into the configuration of an export.
    """

    labels: tuple[str, ...]
    problem: Literal["single_label", "multi_label", "regression"] = "single_label"
    pad: str | None = None
    measured: dict[str, float] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The same in transformers' words."""
        names = dict(enumerate(self.labels))
        return {
            "num_labels": len(self.labels),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": {
                "single_label": "single_label_classification",
                "multi_label": "multi_label_classification",
            }.get(self.problem, "regression"),
        }


def load_tokenizer(backbone: BackboneConfig, tokens: TokensConfig) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """The tokenizer with its tokens and a pad token, and the ids of the tokens that were new to it.

    Raises:
        ConfigError: If there is none.
    """
    own = backbone.tokenizer is None
    source = backbone if own else replace(backbone, revision="main")
    tokenizer = from_pretrained(AutoTokenizer, source, backbone.tokenizer or backbone.path)
    added = add_tokens(tokenizer, tokens)
    if tokenizer.pad_token_id is None:
        # Masking is by position, never by id, so padding with EOS, or with any other token, hides none.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer, added


def load_network(
    backbone: BackboneConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: HeadConfig | None = None,
    tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
    added: dict[str, int] | None = None,
    peft: PeftConfig | None = None,
    adapter: AdapterConfig | None = None,
    packing: bool = False,
    shared_prompts: bool = False,
    device_type: str = "cpu",
    as_stored: bool = False,
) -> nn.Module:
    """The model with room for the tokenizer's tokens, and with new or existing adapters if asked.

    Args:
        backbone: What to load.
        tokenizer: Its tokenizer, with new tokens.
        head: Scores of sequences instead of a language model's logits.
        tokens: How the rows of new tokens begin.
        added: Ids of the new tokens.
        peft: Adapters to add; None trains all weights.
        adapter: An adapter to load instead.
        packing: Whether it will see packed rows.
        shared_prompts: Whether responses in these share a prompt.
        device_type: Where it will run.
        as_stored: Leave the weights in the precision of their files. They are read from there when they are first
            used, so that a process that keeps a shard of each reads and holds no more than that.

    Raises:
        ConfigError: If it cannot be loaded, or cannot be trained that way.
    """
    wrapped = peft is not None or adapter is not None
    _check_backbone(backbone, wrapped, device_type)
    config = from_pretrained(AutoConfig, backbone, backbone.path)
    dtype = "auto" if as_stored else weights_dtype(backbone, wrapped, device_type)
    choose = partial(choose_attention, backbone.attention, packing, device_type, config, shared_prompts)
    load = partial(_load_base, backbone, head, config, device_type)
    known = known_attentions(_class_of(config, head), config)
    try:
        model = load({"attn_implementation": choose(known), "dtype": dtype})
    except KeyError as error:  # an architecture with a table of its own, as Falcon's
        if not lacks_ours(error):
            raise
        model = load({"attn_implementation": choose(replace(known, sdpa=False)), "dtype": dtype})
    fit_vocabulary(model, tokenizer, added or {}, tokens)
    if backbone.liger:
        apply_liger(model)
    set_layers(model, backbone.layers)
    network: nn.Module = model if adapter is None else load_adapter(model, adapter, tokenizer)
    if peft is not None:
        network = add_adapters(model, peft, added or {}, train_head=head is not None)
    if isinstance(network, PeftModel):
        _name_base(network, backbone)
    if isinstance(network, PeftModel) and is_prompt_learning(network):
        _check_virtual_tokens(network, backbone, packing)
    # transformers loads in eval mode, in which dropout and gradient checkpointing silently do nothing.
    return network.train()


def _name_base(network: PeftModel, backbone: BackboneConfig) -> None:
    """Have a saved adapter name its base as the hub does, not where this machine keeps a copy."""
    path, own = Path(backbone.path).expanduser(), network.active_peft_config
    own.revision, own.base_model_name_or_path = backbone.revision, str(path) if path.is_dir() else backbone.path


def _class_of(config: PretrainedConfig, head: HeadConfig | None) -> type[PreTrainedModel] | None:
    """Transformers' class for a configuration, or None if it comes with code of its own.

    Raises:
        ConfigError: If it is the decoder of something that has an encoder too.
    """
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{config.model_type}: an encoder with a decoder, which is no language model by itself. Choose a model "
            "that is a decoder alone as model.backbone.path."
        )
    auto: Any = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    try:
        kind = auto._model_mapping[type(config)]
    except KeyError:
        return None
    found: type[PreTrainedModel] = kind[0] if isinstance(kind, tuple) else kind
    return found


def _load_base(
    backbone: BackboneConfig,
    head: HeadConfig | None,
    config: PretrainedConfig,
    device_type: str,
    options: dict[str, Any],
) -> PreTrainedModel:
    """The language model, or its decoder under a head, with its own weights or random ones."""
    kind: Any = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    if head is not None:
        config.update(head.settings())
    if backbone.weights == "random":
        model: PreTrainedModel = kind.from_config(config, **options)
    else:
        options |= quantized(backbone.quantization, device_type) | {"config": config}
        if head is not None:
            model = _load_under_head(kind, backbone, options)
        else:
            model = from_pretrained(kind, backbone, backbone.path, **options)
        if backbone.quantization == "nf4" and device_type == "cpu":
            keep_differentiable(model)
    if head is not None:
        # Whatever the precision of the decoder: in bfloat16 a score would have three digits.
        output_head(model).float()
    return model


def _load_under_head(kind: Any, backbone: BackboneConfig, options: dict[str, Any]) -> PreTrainedModel:
    """A decoder under a head, which is new unless the weights have one.

    transformers reports a new head and an output embedding without use as a fault; other differences are one.

    Raises:
        ConfigError: If weights of the decoder are missing.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = from_pretrained(kind, backbone, backbone.path, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(before)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(f"{SCORE}."))
    if missing:
        raise ConfigError(
            f"{backbone.path}: {len(missing)} weights of {type(model).__name__} are not there, the first is "
            f"'{missing[0]}'. Are these the weights of another architecture, or not all of them?"
        )
    fitted: PreTrainedModel = model
    return fitted


def _check_backbone(backbone: BackboneConfig, wrapped: bool, device_type: str) -> None:
    """Refuse a folder that is no base, and what only a GPU can do, before anything is loaded."""
    described = Path(local_path(backbone.path)) / "adapter_config.json"
    if described.is_file():
        base = read_json(described, "an adapter's configuration").get("base_model_name_or_path") or "its base"
        raise ConfigError(
            f"{backbone.path}: holds an adapter, which transformers would load unseen. Set backbone.path: {base}, "
            f"model.adapter: {{path: {backbone.path}, trainable: true}} (or false), and model.peft: null."
        )
    if backbone.quantization != "none":
        if not wrapped:
            raise ConfigError("backbone.quantization: quantised weights cannot train; add model.peft (QLoRA).")
        require("bitsandbytes", "qlora", "backbone.quantization: none")
    if backbone.layers.offload and device_type == "cpu":
        raise ConfigError(
            "backbone.activation_offload: on a CPU activations are in the host's memory already. Set it to false."
        )
    if backbone.liger:
        if device_type != "cuda":
            raise ConfigError(f"backbone.liger needs a CUDA GPU, and this run is on {device_type}. Set it to false.")
        require("liger_kernel", "liger", "backbone.liger: false")


def _check_virtual_tokens(network: PeftModel, backbone: BackboneConfig, packing: bool) -> None:
    """Refuse what a model with virtual tokens before its rows cannot do."""
    if packing:
        raise ConfigError(
            f"model.peft: {type(network.active_peft_config).__name__} puts its virtual tokens before each row, so the "
            "conversations of a packed row could not all see them. Set data's packing: false."
        )
    prefix = isinstance(network.active_peft_config, PrefixTuningConfig)
    if prefix and (backbone.compile or backbone.checkpointing != "none"):
        raise ConfigError(
            "model.peft: prefix tuning hands keys and values to each layer as a cache, with which it is neither "
            "compiled nor recomputed. Set backbone.compile: false and backbone.gradient_checkpointing: none."
        )


def stored_dtype(backbone: BackboneConfig) -> torch.dtype | None:
    """Precision of the weights' files, as their configuration has it."""
    found: torch.dtype | None = from_pretrained(AutoConfig, backbone, backbone.path).dtype
    return found


def weights_dtype(backbone: BackboneConfig, wrapped: bool, device_type: str) -> torch.dtype:
    """Precision of the frozen weights, or of all without adapters."""
    if backbone.dtype == "auto":
        return torch.bfloat16 if wrapped and device_type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[backbone.dtype]


def from_pretrained(loader: Any, backbone: BackboneConfig, name: str, **options: Any) -> Any:
    """What one of transformers' Auto classes loads from a folder, the cache or the hub.

    Raises:
        ConfigError: If it cannot be loaded.
        CheckpointError: If that is since a file beside the weights has a field of the wrong type.
    """
    path = local_path(name)
    check_folder(Path(path))
    try:
        return loader.from_pretrained(
            path, revision=backbone.revision, trust_remote_code=backbone.trust_remote_code, **options
        )
    except (AlignmentError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files that are missing, damaged or hostile raise whatever their readers happen to
        if lacks_ours(error):
            raise
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{name}: this model comes with Python code of its own, which is not run unless you ask for it: "
                "model.backbone.trust_remote_code: true, or --trust-remote-code of a tool. Read the code first."
            ) from error
        if path == name and not Path(path).is_dir() and (reason := look_for_hub()):
            raise ConfigError(
                f"{name}: no folder of this name (looked from {Path.cwd()}), not in the cache, and {reason}. "
                + suggestion(name, f"Check backbone.path, or set HF_ENDPOINT to a mirror; {FETCH}")
            ) from error
        check_descriptions(Path(path))
        if "no file named model.safetensors" in str(error):
            raise ConfigError(
                f"{name}: this folder has a configuration and no weights. Give the checkpoint of its training, or a "
                "folder with *.safetensors; to train it from the start set backbone.weights: random."
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"{name}: cannot load this model ({reason}). Give a folder with config.json, tokenizer and "
            f"weights, or a hub name that can be reached; {FETCH}"
        ) from error


def pinned(config: Loaded) -> Loaded:
    """The same model at the commit that was loaded, where its revision is a branch of the hub, which may move."""
    found = None
    if not Path(local_path(config.path)).is_dir():
        cache = constants.HF_HUB_CACHE
        found = try_to_load_from_cache(config.path, "config.json", cache_dir=cache, revision=config.revision)
    return replace(config, revision=Path(found).parent.name) if isinstance(found, str) else config


def decoder_flops_per_token(config: PretrainedConfig, num_parameters: int, num_trainable: int) -> float:
    """Floating-point operations to train one token: 2 per weight forward, 2 backward, and 2 for weight gradients.

    Attention scores are left out, as in the usual 6N rule. Source: Kaplan et al. 2020 (arXiv:2001.08361).
    """
    text = config.get_text_config()
    # The input embedding is a look-up; where it is tied it is also the output projection and counts once.
    lookup = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    return 4.0 * (num_parameters - lookup) + 2.0 * min(num_trainable, num_parameters - lookup)


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
