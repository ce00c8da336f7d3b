"""Split a model over ranks with FSDP2."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lit_alignment.models.head import base_model


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard each decoder layer on its own, and the rest as one group, over a mesh of ranks.

    Frozen and trained weights are sharded alike. Embeddings and output head stay gathered from the forward pass on,
    since the loss is taken from the head's weight after it.
    """
    for layer in base_model(network).get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)
