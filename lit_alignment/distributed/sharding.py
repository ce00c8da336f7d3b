"""Split a model over ranks with FSDP2."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lit_alignment.models.head import base_model
from lit_alignment.models.layers import decoder_layers

Cast = tuple[torch.dtype, torch.dtype]  # what to change, and into what


def shard_layers(network: nn.Module, options: dict[str, Any], cast: Cast | None = None) -> None:
    """Shard each decoder layer on its own, and the rest as one group, over a mesh of ranks.

    Frozen and trained weights are sharded alike. Embeddings and output head stay gathered from the forward pass on,
    since the loss is taken from the head's weight after it.

    Args:
        network: The language model.
        options: As of `fully_shard`.
        cast: Precision to change, layer by layer, so that a rank never holds its shards twice.
    """
    for layer in decoder_layers(base_model(network)):
        fully_shard(layer, **options)
        _cast(layer, cast)
    fully_shard(network, reshard_after_forward=False, **options)
    _cast(network, cast)


def _cast(module: nn.Module, cast: Cast | None) -> None:
    if cast is not None:
        stored, wanted = cast
        change: Callable[..., nn.Module] = module._apply  # the one way that tells FSDP2 of new shards
        change(lambda tensor: tensor.to(wanted) if tensor.dtype == stored else tensor)


def reshard(module: nn.Module) -> None:
    """Let go of what is gathered of a module's sharded parts, so that its parameters are this rank's shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Keep all weights of the sharded parts of a module gathered, so that no forward pass waits for another rank."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    inner = {id(child) for part in parts for child in part.modules() if child is not part}  # the decoder layers
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(id(part) in inner, recurse=False)
            part.reshard()
