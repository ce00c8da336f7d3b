"""A trained model again, from a checkpoint file, a sharded checkpoint, or an adapter folder."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import PreTrainedTokenizerBase

from lit_alignment.errors import CheckpointError, ConfigError, require
from lit_alignment.models.adapters import AdapterConfig, holding
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import BackboneConfig, HeadConfig, load_network, load_tokenizer
from lit_alignment.models.multimodal.modality import (
    TOWERS,
    MediaShape,
    MediaTower,
    ModalityConfig,
    load_tower,
    read_modality,
)
from lit_alignment.models.multimodal.placing import Placement, placed
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig

CHECKPOINT_KEY = "lit_alignment"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint or an adapter folder says about its model.

    Args:
        backbone: The base.
        peft: New adapters that were trained.
        adapter: An existing adapter that was trained on, or the folder itself.
        tokens: New tokens.
        trained: Trained weights by name; empty for an adapter folder, which `adapter` names.
        stop: Token ids and strings that end a turn; None where the folder has its own generation config.
        chat_template: The Jinja template that training used.
        head: What scores, if it is no language model.
        modalities: How images and sounds enter, by name.
        networks: Trained weights of the networks beside the language model, by network and name.
        frozen: Whether the language model did not learn.
    """

    backbone: BackboneConfig
    peft: PeftConfig | None
    adapter: AdapterConfig | None
    tokens: TokensConfig
    trained: dict[str, Tensor]
    stop: dict[str, Any] | None
    chat_template: str | dict[str, str] | None
    head: HeadConfig | None = None
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)
    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    frozen: bool = False


def read_saved(source: Path, base: str | None = None) -> Saved:
    """What stands in a checkpoint file, a folder of a sharded checkpoint, or an adapter folder.

    Args:
        source: The file or folder.
        base: The base model, if it is not where the source says.

    Raises:
        CheckpointError: If it is none of these, or does not say what it belongs to.
    """
    if (source / "adapter_config.json").is_file():
        return _read_adapter(source, base)
    if (source / ".metadata").is_file():
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.ckpt"
            dcp_to_torch_save(source, whole)
            content = _load(whole)
        # Lightning keeps what is no tensor in a file of its own beside the shards.
        return _from_content(source, content | _load(source / "meta.pt"), content, base)
    if source.is_file() or is_deepspeed(source):
        content = read_deepspeed(source) if source.is_dir() else _load(source)
        return _from_content(source, content, content, base)
    raise CheckpointError(
        f"{source}: no checkpoint file, sharded checkpoint (with .metadata), folder of DeepSpeed (with latest) or "
        "adapter folder (with adapter_config.json)."
    )


def is_deepspeed(path: Path) -> bool:
    """Whether a path is a checkpoint of DeepSpeed's, which writes the name of its newest part last."""
    return (path / "latest").is_file()


def read_deepspeed(path: Path) -> dict[str, Any]:
    """A checkpoint of DeepSpeed's, which can hold any Python object, with whole weights and no optimizer.

    Raises:
        ConfigError: Without the package.
        CheckpointError: If it is damaged.
    """
    require("deepspeed", "deepspeed")
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.ckpt"
        try:
            convert_zero_checkpoint_to_fp32_state_dict(path, whole)
        except Exception as error:  # a damaged part raises whatever its reader happens to
            raise CheckpointError(f"{path}: cannot read the checkpoint ({str(error).splitlines()[0]}).") from error
        return _load(whole)


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader happens to
        raise CheckpointError(f"{path}: cannot read the checkpoint ({str(error).splitlines()[0]}).") from error


def _from_content(source: Path, about: dict[str, Any], content: dict[str, Any], base: str | None) -> Saved:
    info = about.get(CHECKPOINT_KEY)
    if not isinstance(info, dict):
        raise CheckpointError(f"{source}: not written by lit_alignment: it does not say what model it belongs to.")
    state = content.get("state_dict", content.get("model", {}))
    networks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        network, _, rest = name.partition(".")  # the module's attribute
        networks.setdefault(network, {})[rest] = value
    backbone = BackboneConfig(**info["backbone"])
    tokens = dict(info["tokens"])
    tokens["new"] = {token: NewTokenConfig(**how) for token, how in tokens["new"].items()}
    return Saved(
        backbone=replace(backbone, path=base) if base else backbone,
        peft=None if info["peft"] is None else PeftConfig.from_peft_type(**info["peft"]),
        adapter=None if info["adapter"] is None else AdapterConfig(**info["adapter"]),
        tokens=TokensConfig(**tokens),
        trained=networks.pop("model", {}),
        stop=info.get("stop"),
        chat_template=info["chat_template"],
        head=None if info.get("head") is None else read_head(info["head"]),
        modalities={name: read_modality(values) for name, values in info.get("modalities", {}).items()},
        networks=networks,
        frozen=bool(info.get("frozen", False)),
    )


def read_head(values: dict[str, Any]) -> HeadConfig:
    """A head from plain values."""
    return HeadConfig(**(values | {"labels": tuple(values["labels"])}))


def _read_adapter(folder: Path, base: str | None) -> Saved:
    config = json.loads((folder / "adapter_config.json").read_text())
    path = base or config.get("base_model_name_or_path")
    if not path:
        raise CheckpointError(f"{folder}: adapter_config.json does not name its base model. Give --base.")
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    head = head_of(folder)
    return Saved(
        BackboneConfig(path, tokenizer=own), None, AdapterConfig(str(folder)), TokensConfig(), {}, None, None, head
    )


MEASURED = ("calibration_temperature", "reward_mean", "reward_std")
PROBLEMS: dict[str, Any] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


def head_of(folder: Path) -> HeadConfig | None:
    """The head that a folder's configuration describes, or None if it is no classifier's."""
    if not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text())
    if not any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        return None
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = tuple(names[str(index)] for index in range(len(names)))
    problem = PROBLEMS.get(config.get("problem_type") or "", "regression" if len(labels) == 1 else "single_label")
    return HeadConfig(labels, problem, measured={name: config[name] for name in MEASURED if name in config})


def refuse_missing(trained: set[str], found: Iterable[str], fix: str) -> None:
    """Refuse weights of which a trained one is missing: non-strict loading would leave it at its start value.

    Args:
        trained: Names of the parameters that train.
        found: Names of the weights that are there.
        fix: What to do, for the message.

    Raises:
        CheckpointError: Naming the first that is missing.
    """
    missing = sorted(trained - set(found))
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} trained weights, the first is '{missing[0]}'. "
            f"Was it made with other adapters or another model? {fix}"
        )


def trained_names(network: nn.Module) -> set[str]:
    """Names of what trains, every alias of a tied weight included."""
    return {name for name, p in network.named_parameters(remove_duplicate=False) if p.requires_grad}


def restore(saved: Saved, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The trained model on the CPU, unquantised, and its tokenizer.

    Args:
        saved: What was trained.
        dtype: Precision of the base.

    Raises:
        ConfigError: If the base was random and its weights are not saved.
        CheckpointError: If a trained weight is missing or does not fit.
    """
    backbone = replace(
        saved.backbone,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        quantization="none",
        liger=False,
        compile=False,
        gradient_checkpointing=False,
    )
    if backbone.weights == "random" and (saved.peft is not None or saved.adapter is not None):
        raise ConfigError("the base of these adapters was random (backbone.weights: random) and is not saved anywhere.")
    tokenizer, added = load_tokenizer(backbone, saved.tokens)
    if saved.head is not None and saved.head.pad is not None:
        tokenizer.pad_token = saved.head.pad
    network = load_network(
        backbone,
        tokenizer,
        head=saved.head,
        tokens=saved.tokens,
        added=added,
        peft=saved.peft,
        adapter=saved.adapter,
    )
    if saved.head is not None:
        base_model(network).config.update(saved.head.measured)
    known = network.state_dict().keys()
    foreign = sorted(name for name in saved.trained if name not in known)
    if foreign:
        raise CheckpointError(f"the checkpoint's weight '{foreign[0]}' has no place in {backbone.path}.")
    if saved.frozen:
        network.requires_grad_(False)
    refuse_missing(trained_names(network), saved.trained, "It may be damaged; use another one.")
    try:
        network.load_state_dict(saved.trained, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint does not fit {backbone.path} ({str(error).splitlines()[-1]})."
        ) from error
    return network.eval(), tokenizer


@dataclass(frozen=True)
class Composed:
    """The media of a trained model.

    Args:
        shapes: Its modalities.
        towers: Their encoders and projectors.
        trained: A checkpoint's weights that count instead of the towers' live ones, by name.
    """

    shapes: dict[str, MediaShape]
    towers: dict[str, MediaTower]
    trained: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reads_images(self) -> bool:
        """Whether there is an encoder; none is loaded where features come from a cache."""
        return "image" in self.towers and len(self.towers["image"].encoders) > 0

    def _ids(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> tuple[int, Tensor]:
        """The placeholder of images, and a prompt with one before it, [1, T]."""
        shape = self.shapes["image"]
        token = int(tokenizer.convert_tokens_to_ids(shape.modality.placeholder("image")))
        return token, torch.tensor([[*prompt[:1], *[token] * shape.number, *prompt[1:]]])

    def _picture(self) -> list[Tensor]:
        """Inputs of the encoders for a picture of noise."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(1, *blank.shape, generator=generator) for blank in self.shapes["image"].blank]

    @torch.no_grad()
    def logits_with_images(
        self, network: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
    ) -> list[Tensor]:
        """Logits after each prompt's tokens with a picture among them, [T, V] each."""
        found, tower = [], self.towers["image"]
        device = next(tower.parameters()).device
        with holding(nn.ModuleDict(self.towers), self.trained):
            for prompt in prompts:
                token, ids = self._ids(tokenizer, prompt)
                picture = tower([each.to(device) for each in self._picture()])
                with placed(network, [Placement(token, picture)]):
                    found.append(network(input_ids=ids.to(device)).logits[0].float().cpu())
        return found

    @torch.no_grad()
    def logits_of_llava(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
    ) -> list[Tensor]:
        """The same of a LLaVA model."""
        pixels = self._picture()[0].to(next(model.parameters()).dtype)
        ids = [self._ids(tokenizer, prompt)[1] for prompt in prompts]
        return [model(input_ids=each, pixel_values=pixels).logits[0].float() for each in ids]


def restore_towers(saved: Saved, network: nn.Module) -> Composed:
    """Encoders and projectors of a trained model, in float32 on the CPU.

    Args:
        saved: Its checkpoint.
        network: Its language model.

    Raises:
        CheckpointError: If a trained weight is missing or does not fit.
    """
    width = int(base_model(network).get_input_embeddings().weight.shape[1])
    shapes, towers = {}, {}
    given = saved.networks.get(TOWERS, {})
    for name, modality in saved.modalities.items():
        shape = shapes[name] = MediaShape(name, replace(modality, cache=None))
        own = {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}
        tower = load_tower(shape, width, any(key.startswith("encoders.") for key in own), "cpu")
        refuse_missing(trained_names(tower), own, "It may be damaged; use another one.")
        try:
            tower.load_state_dict(own, strict=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise CheckpointError(f"the checkpoint's {name} part does not fit its encoder ({reason}).") from error
        towers[name] = tower.eval()
    return Composed(shapes, towers)
