"""Frozen weights in 4 or 8 bits, by bitsandbytes."""

from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

Quantization = Literal["none", "nf4", "int8"]


def quantized(kind: Quantization, device_type: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load the weights of linear layers in 4 or 8 bits, and the rest as it is.

    Source: 4 bits: Dettmers et al. 2023 (arXiv:2305.14314); 8: Dettmers et al. 2022 (arXiv:2208.07339).
    """
    match kind:
        case "none":
            return {}
        case "nf4":
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        case "int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
    return {
        "quantization_config": config,
        "device_map": {"": torch.cuda.current_device() if device_type == "cuda" else device_type},
    }


def keep_differentiable(model: nn.Module) -> None:
    """Have 4-bit layers on a CPU pass gradients on after a pass without any.

    In such a pass bitsandbytes 0.50 repacks the weights for a kernel of AVX-512 that has no backward pass, and uses
    that from then on: adapters below would train on wrong gradients without a word.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
