"""What losses over a large vocabulary share: chunks of positions, whose logits exist one after the other.

N positions, C positions of a chunk, V vocabulary, D width
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

CHUNK_SIZE = 256  # on a CPU, whose caches hold little; on a GPU the fewest
LARGEST_CHUNK = 16_384
BYTES_PER_LOGIT = 16  # logits and probabilities in fp32, their product and its gradient in bf16, and what goes between
COMPILED_ON = ("cuda",)
SHARE_OF_FREE = 16  # the optimizer has no state yet when the first step asks what is free


class LogitShape(NamedTuple):
    """What becomes of the products of hidden states and weight: `softcap(scale * product) / temperature`.

    Args:
        scale: Factor on the logits.
        softcap: c in c * tanh(logits / c).
        temperature: Divides the logits, after the soft cap.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """The derivative by the product, but for the slope of the soft cap."""
        return self.scale / self.temperature


def default_chunk_size(device: torch.device, vocabulary: int) -> int:
    """Positions whose logits exist at one time: 256, or on a GPU as many as a part of its free memory holds.

    Each chunk reads and writes the gradient of a trained head, [V, D] in fp32, so that few and large chunks cost less;
    a GPU is idle in products of a few hundred rows, too. Memory is asked for once; ranks may differ, as they do in N.

    Args:
        device: Where the logits are.
        vocabulary: V, or the sum of those of two heads.
    """
    return _chunk_on_gpu(device, vocabulary) if device.type == "cuda" else CHUNK_SIZE


@cache
def _chunk_on_gpu(device: torch.device, vocabulary: int) -> int:
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return chunk_within(torch.cuda.mem_get_info(device)[0] + cached, vocabulary)


def chunk_within(free: int, vocabulary: int) -> int:
    """The largest power of two from 256 to 16,384 whose logits take at most a sixteenth of the free memory.

    Args:
        free: Bytes.
        vocabulary: V.
    """
    rows = free // (SHARE_OF_FREE * BYTES_PER_LOGIT * vocabulary)
    return min(max(1 << (max(rows, 1).bit_length() - 1), CHUNK_SIZE), LARGEST_CHUNK)


def compiled_on_gpu(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of logits whose passes over them are fused by `torch.compile` where its first argument is on a GPU.

    Compiled at its first call there, once more for chunks of another size; where nothing can compile, as it is, after a
    warning.
    """
    compiled: Any = None
    failed = False

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal compiled, failed
        first = args[0]
        if failed or not isinstance(first, Tensor) or first.device.type not in COMPILED_ON:
            return function(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException  # a second that a CPU need not wait

        compiled = compiled or torch.compile(function)
        try:
            found: Result = compiled(*args, **kwargs)
            return found
        except TorchDynamoException as error:  # before anything was computed
            failed = True
            reason = str(error).partition("\n")[0]
            warnings.warn(f"the loss is not compiled, which costs time alone: {reason}", stacklevel=2)
            return function(*args, **kwargs)

    return call


def wide(values: Tensor) -> Tensor:
    """The values in fp32, or in fp64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """What is computed on the tensor's device keeps the precision of its inputs; devices without autocast always do."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def chunk_product(chunk: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """Products of one chunk, [C, V]; through one buffer: fresh memory each time costs page faults."""
    with without_autocast(chunk):
        if buffer is None:
            return torch.nn.functional.linear(chunk, weight, bias)
        return torch.mm(chunk, weight.T, out=buffer[: len(chunk)])


def product_buffer(weight: Tensor, bias: Tensor | None, rows: int) -> Tensor | None:
    """Memory for the products of all chunks, [C, V], where no bias is added."""
    return weight.new_empty(rows, len(weight)) if bias is None else None


class HeadGradients:
    """Gradients of hidden states, weight and bias, of those that need one, summed over chunks in fp32 at least.

    A sum in bf16 would lose its small terms.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V].
        needed: Of these three, whether each needs a gradient.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> None:
        """Start at zero."""
        sums = torch.promote_types(weight.dtype, torch.float32)
        self.weight_dtype, self.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        self.needed = any(needed)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=sums) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=sums) if bias is not None and needed[2] else None

    def add(self, part: slice, given: tuple[Tensor, Tensor], grad_product: Tensor, factors: Tensor) -> None:
        """Add those of a chunk.

        Args:
            part: Its positions.
            given: Its hidden states, [C, D], and the weight.
            grad_product: Gradient by their product but for the factors, [C, V].
            factors: Of each position, [C]; multiplied with rows of D values, as those of V are longer.
        """
        chunk, weight = given
        factors = factors[:, None]
        with without_autocast(chunk):
            if self.hidden is not None:
                self.hidden[part] = (grad_product @ weight * factors).to(self.hidden.dtype)
            if self.weight is not None:
                _add_product_(self.weight, grad_product, (chunk * factors).to(chunk.dtype))
            if self.bias is not None:
                self.bias.addmv_(grad_product.to(self.bias.dtype).T, factors[:, 0].to(self.bias.dtype))

    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients, each in the precision of what it is of."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(self.weight_dtype),
            None if self.bias is None else self.bias.to(self.bias_dtype),
        )


def _add_product_(total: Tensor, grad_product: Tensor, chunk: Tensor) -> None:
    """Add a chunk's gradient of the weight, [V, D], in one product.

    But for bf16 on a CPU, which has no product with a sum in fp32, and makes a second matrix of that size.
    """
    if grad_product.dtype == total.dtype:
        total.addmm_(grad_product.T, chunk)
    elif total.device.type == "cuda":
        torch.addmm(total, grad_product.T, chunk, out_dtype=total.dtype, out=total)
    else:
        total += grad_product.T @ chunk


def shape_logits_(logits: Tensor, shape: LogitShape, with_slope: bool = False) -> Tensor | None:
    """Shape logits in place; returns the slope of the soft cap, [C, V], if there is one and it is wanted."""
    if shape.scale != 1.0:
        logits *= shape.scale
    slope = None
    if shape.softcap is not None:
        logits.div_(shape.softcap).tanh_()
        slope = 1 - logits**2 if with_slope else None
        logits.mul_(shape.softcap)
    if shape.temperature != 1.0:
        logits.div_(shape.temperature)
    return slope


def softmax_(logits: Tensor, with_argmax: bool = False) -> tuple[Tensor, Tensor]:
    """Make logits [C, V] their softmax; returns the logarithm of each normaliser, [C], and the argmax, [C] or empty."""
    if with_argmax:  # takes four times as long as the largest value alone
        top, best = logits.max(1)
        largest = torch.softmax(logits, 1, out=logits).gather(1, best[:, None]).squeeze(1)
    else:
        top, best = logits.amax(1), logits.new_empty(0, dtype=torch.long)
        largest = torch.softmax(logits, 1, out=logits).amax(1)
    return top - largest.log(), best  # the largest probability is one over the normaliser
