"""Adapters: new ones, existing ones, what is saved of them, and merging them into the weights."""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    XLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Cache, PreTrainedTokenizerBase

from lit_alignment.errors import AlignmentError, CheckpointError, ConfigError
from lit_alignment.files import check_descriptions, read_json
from lit_alignment.models.head import base_model
from lit_alignment.models.tokens import vocabulary_difference
from lit_alignment.moved import renamed
from lit_alignment.paths import local_path

# Initialisations that also change the base weights, so that the adapter alone means nothing without its start.
MUTATING_INITS = ("pissa", "olora", "corda")
REFERENCE = "reference"  # name of a second adapter, which does not train


@dataclass(frozen=True)
class AdapterConfig:
    """An existing adapter.

    Args:
        path: Its folder, with adapter_config.json.
        trainable: Train it further; else it stays as it is.
    """

    path: str
    trainable: bool = False

    def __post_init__(self) -> None:
        """Refuse a folder that is none, or holds its weights as a pickle."""
        folder = Path(self.path).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{self.path}: no adapter_config.json in this folder. Check model.adapter.path.")
        if not (folder / "adapter_model.safetensors").is_file():
            raise ConfigError(
                f"{self.path}: no adapter_model.safetensors in this folder. Weights in a .bin file are a pickle, which "
                "is not loaded; have peft save the adapter again."
            )

    def peft(self) -> PeftConfig:
        """What its folder says of it."""
        file = Path(self.path).expanduser() / "adapter_config.json"
        return inert_peft(read_json(file, "an adapter's configuration"), file)


# Fields of peft's configurations by which a file would name modules to import, or other files to read.
REACHING = ("megatron_config", "prompt_tuning_init_state_dict_path", "cache_file", "covariance_file")


def inert_peft(values: Any, where: object) -> PeftConfig:
    """Adapters as a file describes them, which its description makes neither import nor read anything.

    Args:
        values: Plain values, as of `adapter_config.json`.
        where: The file, for the message.

    Raises:
        CheckpointError: If they are none, or would.
    """
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(values["peft_type"])]
        known = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        reaching = [name for name in REACHING if known.get(name)]
        if reaching or issubclass(kind, XLoraConfig):
            raise CheckpointError(
                f"{where}: {reaching[0] if reaching else kind.__name__} would import, or read, what the file names. "
                "Use adapters without it."
            )
        if issubclass(kind, PromptTuningConfig):  # the texts that they began with, and the tokenizer of these
            known |= {"prompt_tuning_init": "RANDOM", "tokenizer_kwargs": None, "tokenizer_name_or_path": None}
        return kind(**known)
    except AlignmentError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: not a description of adapters that peft has ({error}).") from error


def add_adapters(model: nn.Module, peft: PeftConfig, added: dict[str, int], train_head: bool = False) -> PeftModel:
    """Wrap a model in new adapters, whose weights are float32.

    Args:
        model: The base.
        peft: What to add.
        added: Ids of tokens whose rows train beside LoRA, and no other row of the embeddings.
        train_head: Train and save the layer that scores, too, whatever the configuration says of its task.

    Raises:
        ConfigError: If peft refuses the combination, or cannot train new tokens with it.
    """
    config = copy.deepcopy(peft)
    if train_head:
        if isinstance(config, PrefixTuningConfig):
            raise ConfigError(
                "model.peft: prefix tuning hands keys and values to the model, which transformers' classifiers do not "
                "take from peft. Use peft.LoraConfig, or prompt tuning or P-tuning."
            )
        config.task_type = TaskType.SEQ_CLS
    if added:
        train_token_rows(model, config, added)
    if isinstance(config, PromptTuningConfig) and config.tokenizer_name_or_path:
        config.tokenizer_name_or_path = local_path(config.tokenizer_name_or_path)
    mutates = mutates_base(config)
    try:
        # Randomised initialisations of the base (pissa_niter_N) must come out the same when a run is resumed.
        with torch.random.fork_rng(enabled=mutates):
            if mutates:
                torch.manual_seed(0)
            wrapped: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"model.peft: {error}") from error
    if mutates:  # what the adapter is relative to, for exporting it as a plain LoRA
        start = get_peft_model_state_dict(wrapped)
        wrapped.start_state = {name: value.detach().cpu().clone() for name, value in start.items()}
    return wrapped


def train_token_rows(model: nn.Module, config: PeftConfig, added: dict[str, int]) -> None:
    """Have LoRA also train the rows of new tokens, in the input embedding and, if it is another, in the output's.

    Raises:
        ConfigError: If these adapters cannot train rows.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"model.peft: {type(config).__name__} cannot train the rows of new tokens ({', '.join(added)}). "
            "Use peft.LoraConfig, or no peft."
        )
    base = base_model(model)
    tables = [base.get_input_embeddings()]
    if base.get_output_embeddings() is not None and not base.config.get_text_config().tie_word_embeddings:
        tables.append(base.get_output_embeddings())
    names = {id(module): name.rpartition(".")[2] for name, module in base.named_modules()}
    wanted = [names[id(table)] for table in tables]
    if config.trainable_token_indices is not None or set(config.modules_to_save or ()) & set(wanted):
        return  # the user has said which rows train
    rows = sorted(added.values())
    config.trainable_token_indices = rows if len(wanted) == 1 else {name: rows for name in wanted}


def load_adapter(model: nn.Module, adapter: AdapterConfig, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Wrap a model in an existing adapter.

    Raises:
        CheckpointError: If it was trained with another vocabulary, or does not fit the model.
    """
    folder = Path(adapter.path).expanduser()
    config = adapter.peft()
    if adapter.trainable and config.is_prompt_learning:
        raise ConfigError(
            f"model.adapter: {adapter.path} holds virtual tokens without the encoder that made them, so they cannot "
            "train on. Resume from the checkpoint instead: --ckpt_path."
        )
    try:
        if (folder / "tokenizer_config.json").is_file():
            difference = vocabulary_difference(
                tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            )
            if difference:
                raise CheckpointError(
                    f"{adapter.path}: this adapter was trained with another vocabulary than the backbone's tokenizer: "
                    f"{difference}. Set model.backbone.tokenizer to {adapter.path}, or give model.tokens.new as then."
                )
        config.inference_mode = not adapter.trainable
        wrapped: PeftModel = PeftModel.from_pretrained(
            model, str(folder), is_trainable=adapter.trainable, config=config, use_safetensors=True
        )
        refuse_missing_weights(wrapped, folder / "adapter_model.safetensors")
    except AlignmentError:
        raise
    except Exception as error:  # peft and safetensors raise whatever a wrong description or a damaged file leads to
        check_descriptions(folder)
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{adapter.path}: this adapter does not fit the backbone ({reason}). Check its adapter_config.json."
        ) from error
    if not adapter.trainable:
        wrapped.requires_grad_(False)  # peft leaves virtual tokens trainable
    return wrapped


def refuse_missing_weights(network: PeftModel, file: Path) -> None:
    """Refuse weights of which some are missing: peft would leave these at their start, and say so in a warning.

    Raises:
        CheckpointError: Naming the first.
    """
    with safe_open(file, "pt") as weights:
        found = set(weights.keys())
    missing = sorted(get_peft_model_state_dict(network, save_embedding_layers=False).keys() - found)
    if missing:
        raise CheckpointError(
            f"{file}: lacks {len(missing)} weights of the adapter that its configuration describes, the first is "
            f"'{missing[0]}'. It is damaged, or belongs to another configuration."
        )


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether a model has virtual tokens before the prompt (prefix tuning, prompt tuning, P-tuning)."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def prefix_cache(network: PeftModel, batch_size: int) -> Cache:
    """Keys and values of the virtual tokens, as if they had been read before the tokens, for a batch."""
    prompt = network.get_prompt(batch_size)
    if isinstance(prompt, Cache):
        return prompt
    base = base_model(network)
    cache: Cache = base(inputs_embeds=prompt.to(base.dtype), use_cache=True).past_key_values
    return cache


@contextmanager
def holding(network: nn.Module, trained: dict[str, Tensor]) -> Iterator[None]:
    """Let a model and a checkpoint exchange their trained weights for a while, one by one and without a copy of all.

    Args:
        network: The model.
        trained: The checkpoint's weights by name; meanwhile these are the live ones.
    """
    by_id = {id(p): (name, p) for name, p in network.named_parameters(remove_duplicate=False) if name in trained}

    def exchange() -> None:
        for name, parameter in by_id.values():
            live = parameter.detach().to(trained[name].device, copy=True)
            parameter.data.copy_(trained[name])
            trained[name] = live

    exchange()
    try:
        yield
    finally:
        exchange()


def save_adapter(network: PeftModel, folder: Path) -> None:
    """Write the adapter's two files; one whose start changed the base becomes a plain LoRA of twice the rank.

    Args:
        network: The model, with the weights to write.
        folder: Where to.
    """
    config = network.active_peft_config
    pattern = getattr(config, "rank_pattern", None)
    if isinstance(config, AdaLoraConfig):  # the pattern of another step; what it leaves out is zero
        config.rank_pattern = None
    # The one that trains alone: a reference beside it belongs to no folder.
    network.save_pretrained(str(folder), selected_adapters=[network.active_adapter], save_embedding_layers=False)
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = pattern
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    if mutates_base(network.active_peft_config):
        _convert_to_lora(folder, network.start_state)


def _convert_to_lora(folder: Path, start: dict[str, Tensor]) -> None:
    """Make a saved adapter one over the base as it was: W - B0 A0 + B A = W + [B, -B0] [A; A0].

    Args:
        folder: Of the adapter.
        start: Its weights before training.
    """
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state = load_file(file)
    for name, value in state.items():
        if "lora_A" in name:
            state[name] = torch.cat([value, start[name].to(value.dtype)])
        elif "lora_B" in name:
            state[name] = torch.cat([value, -start[name].to(value.dtype)], dim=1)
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt"})
    config = json.loads(config_file.read_text())
    alpha = math.sqrt(2) if config.get("use_rslora") else 2  # the factor on B A stays
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": alpha * config["lora_alpha"]}
    config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: alpha * value for name, value in config["alpha_pattern"].items()}
    config_file.write_text(json.dumps(config, indent=2))


def why_merge(network: nn.Module) -> str:
    """Why servers such as vLLM cannot load this adapter beside its base, or "" if they can."""
    if not isinstance(network, PeftModel) or is_prompt_learning(network):
        return ""
    config = network.active_peft_config
    if any(isinstance(module, TrainableTokensWrapper) for module in network.modules()):
        return "it holds rows of new tokens"
    if any(isinstance(module, ModulesToSaveWrapper) for module in network.modules()):
        return "it holds whole layers"
    if not isinstance(config, LoraConfig) or isinstance(config, AdaLoraConfig):
        return f"it is no LoRA but {type(config).__name__}"
    if config.use_dora:
        return "it uses DoRA"
    return "it trains biases" if config.bias != "none" or config.lora_bias else ""


@torch.no_grad()
def merged_state(network: PeftModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """State dict of the base model with the adapter in it, each weight merged in float32 and cast once.

    One layer at a time is copied, so the memory is that of the result.

    Args:
        network: The base with its adapter.
        dtype: What floating-point weights are cast to; by default each keeps the precision that it has in the base.

    Raises:
        ConfigError: If the adapter cannot become weights.
    """
    if is_prompt_learning(network):
        raise ConfigError(
            f"{type(network.active_peft_config).__name__}: virtual tokens before the prompt cannot be merged into "
            "weights. Export the adapter instead."
        )
    base = base_model(network)
    merged: dict[str, dict[str, Tensor]] = {}
    for name, module in base.named_modules():
        if any(prefix in merged for prefix in _prefixes(name)):
            continue
        match module:
            case TrainableTokensWrapper():
                adapter = module.token_adapter
                rows = adapter.get_merged_weights(adapter.active_adapters)
                merged[name] = {**module.original_module.state_dict(), "weight": rows}
            case ModulesToSaveWrapper():
                merged[name] = module.modules_to_save[module.active_adapters[0]].state_dict()
            case BaseTunerLayer():
                dtypes = {key: dtype or value.dtype for key, value in module.get_base_layer().state_dict().items()}
                layer: Any = copy.deepcopy(module).float()
                while isinstance(layer, BaseTunerLayer):  # a layer of experts has a wrapper for each of its weights
                    layer.merge()
                    layer = layer.base_layer
                merged[name] = {k: v.to(dtypes[k]) for k, v in layer.state_dict().items()}
    state = {k: v for k, v in base.state_dict().items() if not any(prefix in merged for prefix in _prefixes(k))}
    state |= {f"{name}.{key}": value for name, layer in merged.items() for key, value in layer.items()}
    return {name: cast(value, dtype) for name, value in state.items()}


def cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight on the CPU; floating-point ones in `dtype`, if there is one."""
    value = value.detach().cpu()
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def mutates_base(config: PeftConfig) -> bool:
    """Whether new adapters change the weights of their base, which is the model before training with them alone."""
    init = config.init_lora_weights if isinstance(config, LoraConfig) else None
    return isinstance(init, str) and init.startswith(MUTATING_INITS)


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
