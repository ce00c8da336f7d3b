"""Split a model over ranks with FSDP2."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard

from lit_alignment.models.head import base_model


def shard_layers(network: nn.Module, **options: Any) -> None:
    """Shard each decoder layer on its own, and the rest as one group, over a mesh of ranks.

    Frozen and trained weights are sharded alike. Embeddings and output head stay gathered from the forward pass on,
    since the loss is taken from the head's weight after it.

    Args:
        network: The language model.
        **options: As of `fully_shard`.
    """
    for layer in base_model(network).get_decoder().layers:
        fully_shard(layer, **options)
    fully_shard(network, reshard_after_forward=False, **options)
