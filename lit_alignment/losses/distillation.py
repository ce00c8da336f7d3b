"""Distillation: how far a student's next-token distributions are from a teacher's, without ever holding [N, V].

N positions, V vocabulary, C positions of a chunk, D width of the student, E of the teacher

divergence = b KL(T || M) + (1 - b) KL(S || M),   M = b T + (1 - b) S,   for 0 < b < 1

is the generalized Jensen-Shannon divergence of teacher T and student S, both at the same temperature; b = 1/2 is the
ordinary one. Divided by b, or by 1 - b, it goes to these at the ends, which b = 0 and b = 1 stand for, as in TRL:
KL(T || S) at 0, the usual distillation, and KL(S || T) at 1, which seeks the teacher's modes.

Source: Agarwal et al. 2023 (GKD, arXiv:2306.13649).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_alignment.losses.language_modeling import (
    CHUNK_SIZE,
    add_product_,
    chunk_logits,
    shape_logits_,
    wide,
    without_autocast,
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
    chunk_size: int = CHUNK_SIZE,
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
        chunk_size: Positions a chunk.

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
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Sum and divergences; the gradients go to `ctx`."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_any = needs_hidden or needs_weight or needs_bias
        sums = torch.promote_types(weight.dtype, torch.float32)
        weights = None if weights is None else weights.to(sums)
        divergences = hidden.new_empty(len(hidden), dtype=sums)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if needs_bias and bias is not None else None
        buffers = _buffer(head, min(chunk_size, len(hidden))), _buffer(teacher_head, min(chunk_size, len(hidden)))
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            chunk = hidden[part].to(weight.dtype)
            student, slope = _logits(chunk, head, temperature, buffers[0], with_slope=needs_any)  # [C, V]
            teacher, _ = _logits(teacher_hidden[part], teacher_head, temperature, buffers[1])
            divergences[part], gradient = _divergence_and_gradient_(student, teacher.to(sums), beta, needs_any)
            if gradient is None:
                continue
            gradient = gradient.mul_(slope)
            if weights is not None:
                gradient.mul_(weights[part, None])
            grad_logits = gradient.to(weight.dtype)
            with without_autocast(hidden):
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_logits @ weight).to(hidden.dtype)
                if grad_weight is not None:
                    add_product_(grad_weight, grad_logits, chunk)
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(divergences)
        return (divergences if weights is None else divergences * weights).sum(), divergences

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_divergences: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the sum."""
        scaled = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None, None)


def _logits(
    chunk: Tensor, head: LinearHead, temperature: float, buffer: Tensor | None, with_slope: bool = False
) -> tuple[Tensor, Tensor | float]:
    """Logits of a chunk, [C, V], and their derivative by the product of hidden states and weight."""
    with without_autocast(chunk):
        logits = chunk_logits(chunk.to(head.weight.dtype), head.weight, head.bias, buffer)
    return logits, shape_logits_(logits, head.scale, head.softcap, temperature, with_slope)


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


def _buffer(head: LinearHead, rows: int) -> Tensor | None:
    """Memory for the products of all chunks, where no bias is added."""
    return None if head.bias is not None else head.weight.new_empty(rows, len(head.weight))


def _check(student: torch.Size, teacher: torch.Size, beta: float, temperature: float) -> None:
    if student != teacher:
        raise ValueError(f"logits of the student are {tuple(student)}, those of the teacher {tuple(teacher)}.")
    if not 0 <= beta <= 1 or not 0 < temperature < math.inf:
        raise ValueError(f"beta is {beta} and temperature {temperature}; use 0 to 1, and more than 0.")
