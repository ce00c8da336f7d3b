"""The model before training, beside the one that trains, for losses that compare both."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.errors import ConfigError
from lit_alignment.models.adapters import REFERENCE, is_prompt_learning, mutates_base
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.logprobs import target_logps

COPY = "reference_model"  # the module's attribute that holds a whole model
FrozenCopy = Literal["nothing", "model", "adapter"]  # what of a language model is held a second time


@dataclass(frozen=True)
class ReferenceSyncConfig:
    """A reference that follows the policy: mix * policy + (1 - mix) * reference, weight by weight.

    Of adapters it is their own weights that are mixed, not the products which these stand for.

    Args:
        every_n_steps: Optimizer steps from one update to the next.
        mix: Share of the policy, in (0, 1]; 1 makes the reference the policy of that step.

    Source: Gorbatovski et al. 2024, TR-DPO (arXiv:2404.09656), with mix 1 or about 0.6.
    """

    every_n_steps: int
    mix: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.every_n_steps < 1:
            raise ConfigError(f"model.reference_sync.every_n_steps is {self.every_n_steps}; use 1 or more.")
        if not 0 < self.mix <= 1:
            raise ConfigError(f"model.reference_sync.mix is {self.mix}; use a number in (0, 1].")


@torch.no_grad()
def quiet_logps(
    network: nn.Module, batch: TargetBatch, sequence: SequenceGroup | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each target of a batch without dropout and gradient, [N].

    Args:
        network: A causal language model.
        batch: The rows and their targets.
        sequence: Ranks that share the batch's row.
        temperature: Divides the logits.
    """
    training = network.training
    network.eval()
    try:
        return target_logps(network, batch, temperature=temperature, sequence=sequence)
    finally:
        network.train(training)


def leaves_base(config: PeftConfig) -> bool:
    """Whether a model without its new adapters is the one before training, however long these have trained.

    Args:
        config: The adapters; some change the base's weights when they begin, and some train its biases.
    """
    return not mutates_base(config) and config.to_dict().get("bias", "none") in ("none", None, False)


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Let a model compute without its adapters, whose parameters keep training."""
    if is_prompt_learning(network):
        with _wrapped(network).disable_adapter():
            yield
        return
    with _switched(network, "_disable_adapters", True):
        yield


@contextmanager
def reference_on(network: nn.Module) -> Iterator[None]:
    """Let a model compute with the adapter of `add_reference` in place of the one that trains."""
    with _switched(network, "_active_adapter", [REFERENCE]):
        yield


@contextmanager
def _switched(network: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set what decides which adapters of a model compute; peft's own methods also change which parameters train."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [getattr(layer, name) for layer in layers]  # of some kinds of adapters it is the class that has it
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            setattr(layer, name, own)


def add_reference(network: nn.Module) -> None:
    """Hold a model's adapter a second time, as it is now and frozen, on the same base.

    Raises:
        ConfigError: If peft does not have two adapters of this kind.
    """
    wrapped = _wrapped(network)
    active = wrapped.active_adapter
    trains = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    config = copy.deepcopy(wrapped.active_peft_config)
    config.inference_mode = True
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # some other starts would change the base once more
    try:
        if config.is_prompt_learning:
            raise ValueError("virtual tokens are not a part of the layers")
        with torch.random.fork_rng():  # what is drawn here is overwritten
            wrapped.add_adapter(REFERENCE, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{type(config).__name__} cannot stand twice on one base ({error}).") from error
    wrapped.set_adapter(active)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(name in trains)
    mix_into(adapter_weights(network), 1.0)


def adapter_weights(network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight of the adapter that trains, with that of the adapter of `add_reference`."""
    active = _wrapped(network).active_adapter
    weights: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    weights |= dict(network.named_buffers(remove_duplicate=False))
    seen: set[int] = set()
    for name, kept in weights.items():
        parts = name.split(".")
        if REFERENCE in parts and id(kept) not in seen:
            seen.add(id(kept))
            yield weights[".".join(active if part == REFERENCE else part for part in parts)], kept


def model_weights(network: nn.Module, reference: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight of a model that trains, with that of its copy."""
    kept = dict(reference.named_parameters())
    return ((own, kept[name]) for name, own in network.named_parameters() if own.requires_grad)


def is_reference(name: str) -> bool:
    """Whether a weight of a checkpoint is one of a reference that follows the policy."""
    return name.startswith(f"{COPY}.") or REFERENCE in name.split(".")


@torch.no_grad()
def mix_into(weights: Iterable[tuple[Tensor, Tensor]], mix: float) -> None:
    """Let the second of each two weights become mix * first + (1 - mix) * second."""
    for own, kept in weights:
        kept.lerp_(own.to(kept.dtype), mix) if kept.is_floating_point() else kept.copy_(own)


def without_dropout(network: nn.Module) -> float:
    """Turn a model's dropout off, in training too: else policy and reference differ by chance.

    Returns:
        The highest probability that there was.
    """
    highest = 0.0
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" if isinstance(module, nn.Dropout) else "drop" in name):
                highest = max(highest, value)
                setattr(module, name, 0.0)
    return highest


def _wrapped(network: nn.Module) -> PeftModel:
    """The model, which has adapters."""
    if not isinstance(network, PeftModel):
        raise TypeError(f"{type(network).__name__} has no adapters.")
    return network
