"""How decoder layers run: compiled, and with what the backward pass needs recomputed or held by the host.

B rows, T tokens, D width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from transformers import Cache, PreTrainedModel

from lit_alignment.errors import ConfigError

Checkpointing = Literal["none", "full", "selective"]
Selective = int | Literal["save_attention"]
Forward = Callable[..., Any]  # of a layer, which is its first argument
ATTENTION = ("attention", "attn")  # in the names of PyTorch's attention operators and of FlashAttention's


@dataclass(frozen=True)
class LayerConfig:
    """What is done with each decoder layer.

    Args:
        compile: Compile it with torch.compile. All layers of a kind share one compiled program.
        checkpointing: Recompute nothing in the backward pass, whole layers (`full`), or a part (`selective`).
        selective: Which part: every n-th layer, or all layers but for their attention (`save_attention`).
        offload: Hold the inputs of recomputed layers, which is all that they keep, in the host's memory.

    Source: Chen et al. 2016 (arXiv:1604.06174); selective: Korthikanti et al. 2022 (arXiv:2205.05198).
    """

    compile: bool = False
    checkpointing: Checkpointing = "none"
    selective: Selective = "save_attention"
    offload: bool = False

    def __post_init__(self) -> None:
        """Refuse values without a meaning.

        Raises:
            ConfigError: Naming the setting.
        """
        if self.selective != "save_attention" and self.selective < 2:
            raise ConfigError(
                f"backbone.selective is {self.selective}; give save_attention, or 2 or more to recompute every n-th "
                "layer. For each layer set backbone.gradient_checkpointing: full."
            )
        if self.offload and self.checkpointing != "full":
            raise ConfigError(
                f"backbone.activation_offload: with gradient_checkpointing: {self.checkpointing} all that a layer "
                "computes would go to the host and back, which takes longer than to recompute it. Set "
                "backbone.gradient_checkpointing: full, or activation_offload: false."
            )

    def recomputes(self, index: int) -> bool:
        """Whether the backward pass recomputes a layer, whole or in part."""
        each = 1 if self.checkpointing == "full" or self.selective == "save_attention" else self.selective
        return self.checkpointing != "none" and index % each == 0


class Untraced(Sequence[Any]):
    """A list that torch.compile passes on without a look into it: else it compiles anew for each length.

    Args:
        values: The list.
    """

    def __init__(self, values: list[Any]) -> None:
        """Keep the list."""
        self.values = values

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """One or several of the values."""
        return self.values[index]

    def __len__(self) -> int:
        """Number of values."""
        return len(self.values)


def layer_list(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that a model repeats, from the lowest to the highest; none where it has no list of them."""
    number = model.config.get_text_config().num_hidden_layers
    lists = (each for each in model.modules() if isinstance(each, nn.ModuleList))
    return next((list(each) for each in lists if len(each) == number), [])


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The same of a model that has to have some.

    Raises:
        ConfigError: If it has no list of layers.
    """
    layers = layer_list(model)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no list of decoder layers, so none can be compiled, recomputed, sharded or "
            "estimated by itself. Set backbone.gradient_checkpointing: none and backbone.compile: false, and "
            "trainer.strategy: ddp."
        )
    return layers


def set_layers(model: PreTrainedModel, config: LayerConfig) -> None:
    """Let each decoder layer run as asked, inside of all hooks that others put on it.

    Training passes over the same rows give the same numbers, but for the rounding of compiled kernels. Passes that fill
    or read a cache of keys and values, as generation does, run as the model has it.

    Args:
        model: The model, with or without adapters in it.
        config: What is asked.

    Raises:
        ConfigError: If the architecture has no list of layers.
    """
    if not config.compile and config.checkpointing == "none":
        return
    for index, layer in enumerate(decoder_layers(model)):
        plain: Forward = type(layer).forward
        run = partial(_compiled_run, plain) if config.compile else plain
        if config.recomputes(index):
            partly = config.checkpointing == "selective" and config.selective == "save_attention"
            run = partial(_recomputed, run, partly, config.offload)
        # A method, not a partial function of this layer, so that a copy of the layer has one of its own.
        layer.forward = MethodType(partial(_without_cache, plain, run), layer)


def _without_cache(plain: Forward, run: Forward, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer as asked, or plain where it fills a cache, which a second pass would fill again."""
    cached = any(isinstance(each, Cache) for each in (*args, *kwargs.values()))
    return (plain if cached else run)(layer, *args, **kwargs)


@cache
def _compiled(forward: Forward) -> Forward:
    """One compiled program for all layers of a kind."""
    return torch.compile(forward)


def _compiled_run(plain: Forward, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer by its compiled program.

    Args:
        plain: Its forward.
        layer: The layer.
        *args: Hidden states first, [B, T, D].
        **kwargs: What else the model gives its layers.
    """
    if args and isinstance(args[0], Tensor) and torch.is_grad_enabled() and not args[0].requires_grad:
        # The first layer over a frozen embedding: without this it alone would be compiled once more.
        args = (args[0].detach().requires_grad_(), *args[1:])
    hidden = {name: Untraced(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    return _compiled(plain)(layer, *args, **hidden)


def _recomputed(run: Forward, partly: bool, offload: bool, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer of whose computation the backward pass finds the inputs alone, or these and attention.

    Args:
        run: What runs the layer.
        partly: Keep what attention has computed.
        offload: Hold the inputs in the host's memory.
        layer: The layer.
        *args: Hidden states first, [B, T, D].
        **kwargs: What else the model gives its layers.
    """
    if not layer.training or not torch.is_grad_enabled():
        return run(layer, *args, **kwargs)
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention) if partly else noop_context_fn
    again = partial(checkpoint, run, layer, use_reentrant=False, context_fn=contexts)
    if not offload:
        return again(*args, **kwargs)
    # Page-locked memory, from which a copy does not stop the computation; on a CPU there is nothing to copy.
    with save_on_cpu(pin_memory=any(isinstance(each, Tensor) and each.is_cuda for each in args)):
        return again(*args, **kwargs)


def _keep_attention(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of attention operators, which cost the most to compute for their size."""
    kept = any(part in str(operator) for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
