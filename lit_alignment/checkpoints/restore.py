"""A trained model again, from what its checkpoint or adapter folder says."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_alignment.checkpoints.saved import Saved
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.adapters import holding
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import load_network, load_tokenizer
from lit_alignment.models.multimodal.modality import TOWERS, MediaShape, MediaTower, load_tower
from lit_alignment.models.multimodal.placing import Placement, placed


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


@runtime_checkable
class HasFollowers(Protocol):
    """A module that says which of its frozen weights follow those that train."""

    @property
    def following_names(self) -> set[str]:
        """Names of these."""


def saved_names(module: nn.Module) -> set[str]:
    """Names of what a module's checkpoint holds: what trains, and frozen weights that follow it."""
    return trained_names(module) | (module.following_names if isinstance(module, HasFollowers) else set())


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
        gradient_checkpointing="none",
        activation_offload=False,
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
