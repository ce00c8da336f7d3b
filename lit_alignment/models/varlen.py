"""Attention of a packed row in one call of PyTorch's variable-length kernel, also where responses share a prompt.

H query heads, K key heads, T tokens, N documents, S keys (those of a shared prompt for each response too), C head width
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DTYPES = (torch.bfloat16, torch.float16)  # that the kernel takes
WIDEST = 256  # head, which is a multiple of 8
TOLERANCE = 3e-2  # between two kernels in bfloat16: a share of the largest number


@dataclass(frozen=True)
class Kernel:
    """The kernel, and which of its arguments the installed version has.

    Args:
        function: What has the contract of `torch.nn.attention.varlen.varlen_attn`: [T, H, C] of queries and [S, K, C]
            of keys and values, in which `cu_seq_q` and `cu_seq_k` tell where each document begins and the last ends.
            The last query of a document sees its last key.
        window_size: It has sliding windows; else it takes `is_causal` alone.
        scale: It takes a factor on the scores; else it divides by sqrt(C).
        enable_gqa: It takes fewer key heads than query heads.

    Source: `torch/nn/attention/varlen.py` of PyTorch 2.10 (`is_causal`) and 2.13.
    """

    function: Callable[..., Tensor]
    window_size: bool
    scale: bool
    enable_gqa: bool


@dataclass(frozen=True)
class VarlenLayout:
    """Where the documents of a row lie, for all layers of a forward pass.

    Args:
        kernel: What computes them.
        cu_seq_q: First query of each document, and T, [N + 1], int32.
        cu_seq_k: First key of each document, and S, [N + 1], int32.
        max_q: Most queries of a document.
        max_k: Most keys of a document.
        keys: The token of each key, [S]; None if these are the tokens themselves.
    """

    kernel: Kernel
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    keys: Tensor | None


def installed_kernel() -> Kernel | None:
    """The kernel of the installed PyTorch, if it has one."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return kernel_of(varlen_attn)


@cache
def kernel_of(function: Callable[..., Tensor]) -> Kernel:
    """A kernel as its signature describes it."""
    known = inspect.signature(function).parameters
    return Kernel(function, "window_size" in known, "scale" in known, "enable_gqa" in known)


def varlen_layout(
    kernel: Kernel, lengths: Sequence[int], parents: Sequence[int] | None, device: torch.device
) -> VarlenLayout:
    """The layout of a packed row, on the device.

    Args:
        kernel: What computes the documents.
        lengths: Of the documents.
        parents: For each document the one whose keys it sees before its own, or -1; None if there are none.
        device: Where the row is.
    """
    starts = [0, *accumulate(lengths)]
    parents = parents or [-1] * len(lengths)
    seen = [length + (lengths[parent] if parent >= 0 else 0) for length, parent in zip(lengths, parents, strict=True)]
    cu_seq_q = to_device(torch.tensor(starts, dtype=torch.int32, device="cpu"), device)
    if max(parents) < 0:
        return VarlenLayout(kernel, cu_seq_q, cu_seq_q, max(lengths), max(lengths), None)
    ranges = [torch.arange(*span, device="cpu") for span in pairwise(starts)]
    own = zip(ranges, parents, strict=True)
    keys = torch.cat([part for tokens, parent in own for part in ([ranges[parent]] if parent >= 0 else []) + [tokens]])
    cu_seq_k = to_device(torch.tensor([0, *accumulate(seen)], dtype=torch.int32, device="cpu"), device)
    return VarlenLayout(kernel, cu_seq_q, cu_seq_k, max(lengths), max(seen), to_device(keys, device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on another device, for which the host does not wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in the precision of autocast, where it is on: it knows SDPA, and not this kernel."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    precision = torch.get_autocast_dtype(device)
    return query.to(precision), key.to(precision), value.to(precision)


def computes(layout: VarlenLayout, query: Tensor, value: Tensor, dropout: float, sliding_window: int | None) -> bool:
    """Whether the kernel computes a layer's attention.

    Args:
        layout: Of the row.
        query: [B, H, T, C].
        value: [B, K, T, C].
        dropout: Dropout on the attention weights, which it lacks.
        sliding_window: How many positions back a token may look, itself included.
    """
    width = query.shape[-1]
    shapes = width == value.shape[-1] and width <= WIDEST and width % 8 == 0
    return (
        query.dtype in DTYPES
        and query.dtype == value.dtype
        and shapes
        and dropout == 0
        and (layout.kernel.window_size or sliding_window is None or sliding_window >= layout.max_k)
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: VarlenLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of each document of a packed row to itself and to the prompt that it continues.

    A response's keys are those of its prompt, then its own; gradients of a shared prompt's keys add up.

    Args:
        query: [1, H, T, C].
        key: [1, K, T, C].
        value: [1, K, T, C].
        layout: Of the row.
        scaling: Factor on the scores; None is 1 / sqrt(C).
        sliding_window: How many positions back a token may look, itself included.

    Returns:
        Output, [1, T, H, C].
    """
    kernel = layout.kernel
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, C]
    if layout.keys is not None:
        key, value = key.index_select(0, layout.keys), value.index_select(0, layout.keys)  # [S, K, C]
    arguments: dict[str, object] = {}
    if not kernel.window_size:
        arguments["is_causal"] = True
    elif sliding_window is None or sliding_window >= layout.max_k:
        arguments["window_size"] = (-1, 0)
    else:
        arguments["window_size"] = (sliding_window - 1, 0)
    if scaling is not None and kernel.scale:
        arguments["scale"] = scaling
    elif scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and kernel.enable_gqa:
        arguments["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    ends = (layout.cu_seq_q, layout.cu_seq_k, layout.max_q, layout.max_k)
    return kernel.function(query, key, value, *ends, **arguments)[None]


def varlen_obstacle() -> str | None:
    """Why the kernel cannot be used on this process's CUDA device, or None if it can."""
    kernel = installed_kernel()
    if kernel is None:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen, which came with 2.10"
    if not torch.cuda.is_available():
        return "no CUDA device is there"
    return differs_from_sdpa(kernel, torch.device("cuda", torch.cuda.current_device()))


@cache
def differs_from_sdpa(kernel: Kernel, device: torch.device) -> str | None:
    """What is wrong with a kernel's outputs and gradients of a few tokens, or None.

    A prompt of 5 tokens and a response of 3 that continues it are a causal row of 8; a kernel that aligns queries with
    the first keys instead of the last ones would hide most of the prompt from the response.

    Args:
        kernel: Asked once on each device.
        device: Where it is to run.
    """
    windows = (None, 4) if kernel.window_size else (None,)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            wrong = any(_differs(kernel, device, window) for window in windows)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"the kernel of torch.nn.attention.varlen does not run on {device}: {' '.join(str(error).split())[:200]}"
    return f"the kernel of torch.nn.attention.varlen does not compute what SDPA does on {device}" if wrong else None


def _differs(kernel: Kernel, device: torch.device, window: int | None) -> bool:
    """Whether outputs or gradients of a shared prompt differ from SDPA's."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(heads: int) -> Tensor:
        numbers = torch.randn(1, heads, 8, 64, generator=generator, device="cpu", dtype=torch.float32)
        return numbers.to(device, DTYPES[0]).requires_grad_()

    query, key, value, weight = random(4), random(2), random(2), random(4).detach()
    rows, columns = torch.arange(8, device=device)[:, None], torch.arange(8, device=device)
    mask = (columns <= rows) & (rows - columns < (window or 8))
    expected = scaled_dot_product_attention(query, key, value, mask, scale=0.1, enable_gqa=True)
    layout = varlen_layout(kernel, [5, 3], [-1, 0], device)
    found = varlen_attention(query, key, value, layout, 0.1, window).transpose(1, 2)
    pairs = [(found, expected)]
    gradients = (torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (found, expected))
    pairs += zip(*gradients, strict=True)
    pairs = [(one.detach(), other.detach()) for one, other in pairs]
    return not all(float((one - other).abs().max()) <= TOLERANCE * float(other.abs().max()) for one, other in pairs)
