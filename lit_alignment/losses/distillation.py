"""Distillation: how far a student's next-token distributions are from a teacher's, without ever holding [N, V].

N positions, V vocabulary, C positions of a chunk, D width of the student, E of the teacher

divergence = b KL(T || M) + (1 - b) KL(S || M),   M = b T + (1 - b) S,   for 0 < b < 1

is the generalized Jensen-Shannon divergence of teacher T and student S, both at the same temperature; b = 1/2 is the
ordinary one. Divided by b, or by 1 - b, it goes to these at the ends, which b = 0 and b = 1 stand for, as in TRL:
KL(T || S) at 0, the usual distillation, and KL(S || T) at 1, which seeks the teacher's modes.

Source: Agarwal et al. 2023 (GKD, arXiv:2306.13649).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_alignment.losses.chunks import (
    HeadGradients,
    LogitShape,
    chunk_product,
    compiled_on_gpu,
    default_chunk_size,
    product_buffer,
    shape_logits_,
    wide,
)


@dataclass(frozen=True)
class LinearHead:
    """What makes logits of hidden states: `softcap(scale * (hidden @ weight.T + bias))`.

    Args:
        weight: Output embedding, [V, D].
        bias: [V].
        scale: Factor on the logits.
        softcap: c in c * tanh(logits / c).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def token_divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Divergence of each position's distributions, nats, fp32 at least, [N]; no gradient reaches the teacher.

    The plain form of `linear_divergence`, for heads that are not one matrix product.

    Args:
        student: Logits, [N, V].
        teacher: Logits, [N, V].
        beta: b, from 0 to 1.
        temperature: Divides the logits of both. The divergence is not multiplied by its square.

    Raises:
        ValueError: If shapes differ, or a setting is outside its range.
    """
    _check(student.shape, teacher.shape, beta, temperature)
    log_student = (wide(student) / temperature).log_softmax(-1)
    log_teacher = (wide(teacher.detach()).to(log_student.dtype) / temperature).log_softmax(-1)
    if beta == 0:
        return _kl(log_teacher, log_student)
    if beta == 1:
        return _kl(log_student, log_teacher)
    log_mixture = _log_mixture(log_student, log_teacher, beta)
    return beta * _kl(log_teacher, log_mixture) + (1 - beta) * _kl(log_student, log_mixture)


def linear_divergence(
    hidden: Tensor,
    head: LinearHead,
    teacher_hidden: Tensor,
    teacher_head: LinearHead,
    weights: Tensor | None = None,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of `token_divergence`, with gradient for the student, and the divergence of each position without.

    The gradients are computed in the forward pass, chunk by chunk, so that logits of only `chunk_size` positions exist
    at once, and nothing of size V but the gradient of a trained head is kept for the backward pass.

    Args:
        hidden: Last hidden states of the student, [N, D].
        head: Its output embedding, of which weight and bias can be trained.
        teacher_hidden: Last hidden states of the teacher at the same positions, [N, E].
        teacher_head: Its output embedding, over the same vocabulary.
        weights: Weight of each position in the sum, [N]; None means 1.
        beta: b, from 0 to 1.
        temperature: Divides the logits of both, after the soft cap.
        chunk_size: Positions a chunk; None chooses by the device (`default_chunk_size`).

    Returns:
        The sum, a scalar, and the divergences, [N], in nats; fp32, or fp64 where the student's weight is.

    Raises:
        ValueError: If positions or vocabularies differ, or a setting is outside its range.
    """
    student = torch.Size((len(hidden), len(head.weight)))
    _check(student, torch.Size((len(teacher_hidden), len(teacher_head.weight))), beta, temperature)
    if weights is not None and weights.shape != hidden.shape[:1]:
        raise ValueError(f"hidden has {len(hidden)} positions, but weights has shape {tuple(weights.shape)}.")
    trained = hidden, head.weight, head.bias
    if not torch.is_grad_enabled():  # or the gradients would be made in vain
        trained = hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach()
    total, divergences = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        *trained, head, teacher_hidden, teacher_head, weights, beta, temperature, chunk_size
    )
    return total, divergences


class _LinearDivergence(torch.autograd.Function):
    """The chunked divergence; its forward pass also makes the gradients that its backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LinearHead,
        teacher_hidden: Tensor,
        teacher_head: LinearHead,
        weights: Tensor | None,
        beta: float,
        temperature: float,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Sum and divergences; the gradients go to `ctx`."""
        sums = torch.promote_types(weight.dtype, torch.float32)
        weights = hidden.new_ones(len(hidden), dtype=sums) if weights is None else weights.to(sums)
        divergences = hidden.new_empty(len(hidden), dtype=sums)
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        shapes = [LogitShape(each.scale, each.softcap, temperature) for each in (head, teacher_head)]
        size = chunk_size or default_chunk_size(weight.device, 2 * len(weight))
        buffers = [product_buffer(each.weight, each.bias, min(size, len(hidden))) for each in (head, teacher_head)]
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            chunk, teacher_chunk = hidden[part].to(weight.dtype), teacher_hidden[part].to(teacher_head.weight.dtype)
            product = chunk_product(chunk, weight, bias, buffers[0])  # [C, V]
            teacher = chunk_product(teacher_chunk, teacher_head.weight, teacher_head.bias, buffers[1])
            divergences[part] = _divergence_(product, teacher, shapes, beta, gradients.needed)
            if gradients.needed:
                gradients.add(part, (chunk, weight), product, weights[part] * shapes[0].factor)
        ctx.save_for_backward(*gradients.sums())
        ctx.mark_non_differentiable(divergences)
        return (divergences * weights).sum(), divergences

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_divergences: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the sum."""
        scaled = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None, None)


@compiled_on_gpu
def _divergence_(
    product: Tensor, teacher_product: Tensor, shapes: Sequence[LogitShape], beta: float, with_gradient: bool
) -> Tensor:
    """The divergence of each position, [C]; the student's product becomes its gradient but for `shapes[0].factor`.

    Args:
        product: Of the student's hidden states and weight, [C, V].
        teacher_product: Of the teacher's, [C, V]; it is overwritten.
        shapes: What becomes of the products.
        beta: b, from 0 to 1.
        with_gradient: Whether that is wanted.
    """
    student, teacher = wide(product), wide(teacher_product)
    slope = shape_logits_(student, shapes[0], with_slope=with_gradient)
    shape_logits_(teacher, shapes[1])
    values, gradient = _divergence_and_gradient_(student, teacher.to(student.dtype), beta, with_gradient)
    if gradient is not None:
        product.copy_(gradient if slope is None else gradient.mul_(slope))
    return values


def _divergence_and_gradient_(
    student: Tensor, teacher: Tensor, beta: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence of each row of logits, [C], and its gradient by the student's, [C, V]; overwrites both logits."""
    student.sub_(student.logsumexp(1, keepdim=True))
    teacher.sub_(teacher.logsumexp(1, keepdim=True))
    if beta == 0:  # S - T
        probabilities = teacher.exp()
        values = teacher.sub_(student).mul_(probabilities).sum(1)
        return values, student.exp_().sub_(probabilities) if with_gradient else None
    # (1 - b) S (log S - log M - KL(S || M)); at b = 1 M is the teacher, and what it is divided by takes 1 - b away.
    mixture = teacher if beta == 1 else _log_mixture(student, teacher, beta)
    probabilities = student.exp()
    student.sub_(mixture)
    reverse = (student * probabilities).sum(1)
    share = 1.0 if beta == 1 else 1 - beta
    values = share * reverse
    if beta != 1:
        values += beta * (teacher.exp() * teacher.sub_(mixture)).sum(1)
    return values, student.sub_(reverse[:, None]).mul_(probabilities).mul_(share) if with_gradient else None


def _log_mixture(log_student: Tensor, log_teacher: Tensor, beta: float) -> Tensor:
    """log(b T + (1 - b) S), from logarithms alone, so that what is unlikely under both keeps its digits."""
    return torch.logaddexp(log_student + math.log1p(-beta), log_teacher + math.log(beta))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, [N]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _check(student: torch.Size, teacher: torch.Size, beta: float, temperature: float) -> None:
    if student != teacher:
        raise ValueError(f"logits of the student are {tuple(student)}, those of the teacher {tuple(teacher)}.")
    if not 0 <= beta <= 1 or not 0 < temperature < math.inf:
        raise ValueError(f"beta is {beta} and temperature {temperature}; use 0 to 1, and more than 0.")
