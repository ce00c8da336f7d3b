"""The model before training, beside the one that trains, for losses that compare both."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.errors import ConfigError
from lit_alignment.models.adapters import AdapterConfig, is_prompt_learning, mutates_base, refuse_missing_weights
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.logprobs import target_logps

FrozenCopy = Literal["nothing", "model", "adapter"]  # what of a language model is held a second time
REFERENCE = "reference"  # name of an adapter that is kept as it was


@torch.no_grad()
def quiet_logps(network: nn.Module, batch: TargetBatch, sequence: SequenceGroup | None = None) -> Tensor:
    """Log-probability of each target of a batch without dropout and gradient, [N].

    Args:
        network: A causal language model.
        batch: The rows and their targets.
        sequence: Ranks that share the batch's row.
    """
    training = network.training
    network.eval()
    try:
        return target_logps(network, batch, sequence=sequence)
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


def add_reference(network: nn.Module, adapter: AdapterConfig) -> None:
    """Load an existing adapter a second time, frozen, beside the one that trains on the same base.

    Raises:
        ConfigError: If peft does not have two adapters of this kind.
    """
    wrapped = _wrapped(network)
    folder = Path(adapter.path).expanduser()
    trains = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    active = wrapped.active_adapter
    config = adapter.peft()
    config.inference_mode = True
    try:
        wrapped.load_adapter(str(folder), REFERENCE, is_trainable=False, peft_config=config, use_safetensors=True)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"model.adapter: {type(config).__name__} cannot stand twice on one base ({error}). Set model.reference to "
            "cached."
        ) from error
    refuse_missing_weights(wrapped, folder / "adapter_model.safetensors")
    wrapped.set_adapter(active)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(name in trains)


def without_dropout(network: nn.Module) -> None:
    """Turn a model's dropout off, in training too: else policy and reference differ by chance."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" if isinstance(module, nn.Dropout) else "drop" in name):
                setattr(module, name, 0.0)


def _wrapped(network: nn.Module) -> PeftModel:
    """The model, which has adapters."""
    if not isinstance(network, PeftModel):
        raise TypeError(f"{type(network).__name__} has no adapters.")
    return network
