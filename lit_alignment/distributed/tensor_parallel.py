"""Tensor parallelism: each rank has a slice of every decoder layer's matrices, and all see the same tokens.

R ranks
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lit_alignment.errors import ConfigError
from lit_alignment.models.head import base_model, local

LAYERS = "layers.*."  # how transformers' plans name the parts of each decoder layer
SETTING = "trainer.strategy.tensor_parallel_size"


class Replicated(ParallelStyle):
    """A layer that every rank has whole, with weights on the same mesh as those that are split."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(
                DTensor.from_local(each, mesh, [Replicate()], run_check=False) if isinstance(each, Tensor) else each
                for each in inputs
            )

        def leave(module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
            return local(outputs)

        return distribute_module(module, device_mesh, None, enter, leave)  # type: ignore[arg-type]


def split_layers(network: nn.Module, mesh: DeviceMesh) -> None:
    """Split the matrices of every decoder layer as transformers' plan for the architecture says.

    Each pair of matrices needs one sum over the ranks. LoRA's factors are split like the matrix that they stand beside.

    Args:
        network: A decoder, with or without LoRA.
        mesh: Of R ranks.

    Raises:
        ConfigError: As of `split_plan`.

    Source: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053).
    """
    parallelize_module(network, mesh, split_plan(network, mesh.size()), src_data_rank=None)


def split_plan(network: nn.Module, ranks: int) -> dict[str, ParallelStyle]:
    """How each module with weights is split, by name.

    Raises:
        ConfigError: If there is no plan of columns and rows, or something in a layer is not in it.
    """
    styles = layer_plan(base_model(network).config, ranks)
    plan: dict[str, ParallelStyle] = {}
    for name, module in network.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        path = name.split(".")
        inside = ".".join(path[path.index("layers") + 2 :]) if "layers" in path else ""
        plan[name] = _style(name, inside, module, styles)
    return plan


def layer_plan(config: Any, ranks: int) -> dict[str, str]:
    """`colwise` or `rowwise` for each matrix of a decoder layer, by its name in the layer.

    Raises:
        ConfigError: If the architecture has no such plan, or its heads cannot be divided.
    """
    text = config.get_text_config()
    known: dict[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    plan = {name.removeprefix(LAYERS): style for name, style in known.items()}
    if not plan or not set(plan.values()) <= {"colwise", "rowwise"}:
        raise ConfigError(f"{SETTING}: there is no plan for {text.model_type} that we can follow. Set it to 1.")
    for heads in (text.num_attention_heads, text.num_key_value_heads):
        if heads % ranks:
            raise ConfigError(f"{SETTING} is {ranks}, by which {heads} heads cannot be divided. Use a divisor.")
    return plan


def _style(name: str, inside: str, module: nn.Module, styles: dict[str, str]) -> ParallelStyle:
    """How a module with weights is split; `inside` is its name in a decoder layer, or empty outside of them."""
    style = styles.get(inside.split(".base_layer")[0].split(".lora_")[0])
    # The norms stand in a layer itself; what else is deeper would see a part of the heads.
    whole = style is None and "." not in inside and not isinstance(module, nn.ParameterDict)
    if not whole and (style is None or not isinstance(module, nn.Linear)):
        raise ConfigError(f"{SETTING}: {name} cannot be split. Set it to 1.")
    # Of LoRA's two factors one stands on the side of the matrix that is whole.
    if whole or (style == "colwise" and ".lora_A." in inside) or (style == "rowwise" and ".lora_B." in inside):
        return Replicated()
    return ColwiseParallel() if style == "colwise" else RowwiseParallel()
