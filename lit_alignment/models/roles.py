"""What the parameters of a network are to an optimizer: how high in it, and whether hidden matrices."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lit_alignment.models.dual_encoder import DualEncoder
from lit_alignment.models.layers import layer_list
from lit_alignment.optimizers.groups import Roles


def roles_of(network: nn.Module) -> Roles:
    """Heights of a network's parameters, and its hidden matrices.

    The highest layer, the head and the last norm have height 0, each layer below one more, the embeddings one more than
    the lowest. Adapters are as high as what they change, and are no hidden matrices: their factors act as a product.

    Args:
        network: A language model with or without adapters, or a retriever.
    """
    towers = [network.query_tower, network.passage_tower] if isinstance(network, DualEncoder) else [network]
    heights: dict[int, int] = {}
    hidden: set[int] = set()
    for tower in towers:
        model = tower.get_base_model() if isinstance(tower, PeftModel) else tower
        layers = layer_list(model) if isinstance(model, PreTrainedModel) else []
        for module in tower.modules():
            if isinstance(module, nn.Embedding):
                heights |= dict.fromkeys(map(id, module.parameters()), len(layers))
        if isinstance(model, PreTrainedModel):  # adapters around the embedding hold it
            heights |= dict.fromkeys(map(id, model.get_input_embeddings().parameters()), len(layers))
        for height, layer in enumerate(reversed(layers)):
            heights |= dict.fromkeys(map(id, layer.parameters()), height)
            if not isinstance(tower, PeftModel):
                hidden |= {id(parameter) for parameter in layer.parameters() if parameter.ndim == 2}
    return Roles(heights=heights, hidden=hidden)
