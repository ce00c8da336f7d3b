"""Next-token losses over a large vocabulary, without ever holding [N, V].

N trained positions, V vocabulary, D width
"""

from collections.abc import Iterator
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
    softmax_,
    wide,
)


def token_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of each target under its logits, and how many targets were the argmax.

    loss = sum_n w_n * [(1 - s) * -log p_n(y_n) + s / V * sum_v -log p_n(v)]

    The plain form of `linear_cross_entropy`, for models whose logits are not one matrix product.

    Args:
        logits: Scores, [N, V]; the softmax is taken in fp32.
        targets: Token ids, [N].
        weights: Weight of each position, [N]; None means 1.
        label_smoothing: s, the probability spread evenly over the vocabulary.

    Returns:
        The sum in nats, fp32 scalar, and the number of hits, int64 scalar.

    Source: label smoothing: Szegedy et al. 2016 (arXiv:1512.00567).
    """
    losses = torch.nn.functional.cross_entropy(
        logits.float(), targets, reduction="none", label_smoothing=label_smoothing
    )
    total = losses.sum() if weights is None else (losses * weights).sum()
    return total, (logits.detach().argmax(-1) == targets).sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `softcap(scale * (hidden @ weight.T + bias))`, and the number of argmax hits.

    Equal to `token_cross_entropy` of those logits. The gradients are computed in the forward pass, chunk by
    chunk (softmax minus the target distribution, times the weights), so that the logits of only `chunk_size`
    positions exist at once and nothing of size V is kept for the backward pass.

    Args:
        hidden: Last hidden states at the trained positions, [N, D].
        weight: Output embedding, [V, D].
        targets: Token ids, [N].
        weights: Weight of each position, [N]; None means 1.
        bias: Output bias, [V].
        label_smoothing: Probability spread evenly over the vocabulary.
        scale: Factor on the logits (`logit_scale` of Cohere, 1 / `logits_scaling` of Granite).
        softcap: c in c * tanh(logits / c) (`final_logit_softcapping` of Gemma 2).
        chunk_size: Positions a chunk; None chooses by the device (`default_chunk_size`).

    Returns:
        The sum in nats, fp32 scalar, and the number of hits, int64 scalar.

    Raises:
        ValueError: If the number of targets or weights differs from the number of hidden states.

    Source: Wijmans et al. 2024 (arXiv:2411.09009) and Hsu et al. 2024 (arXiv:2410.10989) for the idea of
    never storing the logits; the gradient is accumulated here in fp32, also for bf16 inputs.
    """
    if targets.shape != hidden.shape[:1] or (weights is not None and weights.shape != targets.shape):
        raise ValueError(
            f"hidden has {hidden.shape[0]} positions, but targets has shape {tuple(targets.shape)}"
            + ("" if weights is None else f" and weights {tuple(weights.shape)}")
            + "; all must agree."
        )
    loss, hits = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, weights, label_smoothing, LogitShape(scale, softcap), chunk_size
    )
    return loss, hits


class _LinearCrossEntropy(torch.autograd.Function):
    """The chunked loss; its forward pass also makes the gradients that its backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        label_smoothing: float,
        shape: LogitShape,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and hits; the gradients go to `ctx`."""
        sums = torch.promote_types(weight.dtype, torch.float32)
        total, hits = hidden.new_zeros((), dtype=sums), targets.new_zeros(())
        weights = torch.ones_like(targets, dtype=sums) if weights is None else weights.to(sums)
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for part, chunk, product in _products(hidden, weight, bias, chunk_size):
            losses, best, at_target = _loss_and_gradient_(
                product, targets[part], shape, label_smoothing, with_argmax=True, with_gradient=gradients.needed
            )
            hits += (best == targets[part]).sum()
            total += (losses * weights[part]).sum()
            if gradients.needed:
                _put_(product, targets[part], at_target)
                gradients.add(part, (chunk, weight), product, weights[part] * shape.factor)
        ctx.save_for_backward(*gradients.sums())
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_hits: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the loss."""
        scaled = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def _products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Positions of each chunk, its hidden states in the weight's precision, [C, D], and their products, [C, V]."""
    size = chunk_size or default_chunk_size(weight.device, len(weight))
    buffer = product_buffer(weight, bias, min(size, len(hidden)))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        chunk = hidden[part].to(weight.dtype)
        yield part, chunk, chunk_product(chunk, weight, bias, buffer)


def _put_(gradient: Tensor, targets: Tensor, at_target: Tensor) -> None:
    """Put values at each position's target, [C, 1], into [C, V]; `scatter_` of bf16 passes over all of it on a CPU."""
    gradient[torch.arange(len(targets), device=targets.device), targets] = at_target.squeeze(1).to(gradient.dtype)


@compiled_on_gpu
def _loss_and_gradient_(
    product: Tensor,
    targets: Tensor,
    shape: LogitShape,
    label_smoothing: float = 0.0,
    with_argmax: bool = False,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each position, [C], its argmax, [C], and the gradient by the product at its target, [C, 1].

    The product becomes that gradient everywhere else. Both lack `shape.factor`. What is not wanted is empty.

    Passes over [C, V], without a soft cap and smoothing: the product of hidden states and weight writes it, the search
    for the largest logit reads it, the softmax reads and writes it (its own passes over a row find it in a cache), and
    the two products of the gradient read it. In bf16 it is also made fp32 and rounded again, which are no passes of
    their own where this is compiled. One at a target is taken off its probability in fp32, or bf16 would round first.

    Args:
        product: Of hidden states and weight, [C, V].
        targets: Token ids, [C].
        shape: What becomes of the product.
        label_smoothing: Probability spread evenly over the vocabulary.
        with_argmax: Whether that is wanted.
        with_gradient: Whether that is wanted.
    """
    logits, column = wide(product), targets[:, None]
    slope = shape_logits_(logits, shape, with_slope=with_gradient)
    target_logits = logits.gather(1, column)
    mean_logits = logits.mean(1, keepdim=True) if label_smoothing else target_logits
    log_normaliser, best = softmax_(logits, with_argmax)
    losses = log_normaliser - torch.lerp(target_logits, mean_logits, label_smoothing).squeeze(1)
    if not with_gradient:
        return losses, best, losses.new_empty(0)
    if label_smoothing:
        logits.sub_(label_smoothing / logits.shape[1])
    at_target = logits.gather(1, column) - (1 - label_smoothing)
    if slope is not None:
        at_target = at_target * slope.gather(1, column)
        logits *= slope
    product.copy_(logits)
    return losses, best, at_target


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each target under `softcap(scale * (hidden @ weight.T + bias)) / temperature`.

    For losses that weigh tokens by what the log-probabilities turn out to be, as marginal likelihoods do. The backward
    pass makes the logits of each chunk again, so that those of only `chunk_size` positions exist at once; below a
    frozen head it need not, since the forward pass has kept each token's gradient by its hidden state.

    Args:
        hidden: Last hidden states at the trained positions, [N, D].
        weight: Output embedding, [V, D].
        targets: Token ids, [N].
        bias: Output bias, [V].
        scale: Factor on the logits.
        softcap: c in c * tanh(logits / c).
        temperature: Divides the logits, after the soft cap, as in sampling.
        chunk_size: Positions a chunk; None chooses by the device (`default_chunk_size`).

    Returns:
        Nats, fp32 (fp64 for fp64 weights), [N], with gradient.

    Raises:
        ValueError: If the number of targets differs from the number of hidden states.
    """
    logps, _ = _chunked_logps(hidden, weight, targets, bias, LogitShape(scale, softcap, temperature), False, chunk_size)
    return logps


def linear_logps_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What `linear_logps` returns, and the entropy of each position's distribution, [N] each, both with gradient."""
    return _chunked_logps(hidden, weight, targets, bias, LogitShape(scale, softcap, temperature), True, chunk_size)


def token_logps_and_entropies(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form of `linear_logps_and_entropies`, for models whose logits are not one matrix product.

    Args:
        logits: [N, V]; the softmax is taken in fp32 at least.
        targets: Token ids, [N].
    """
    log_probabilities = wide(logits).log_softmax(-1)
    logps = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    return logps, -(log_probabilities.exp() * log_probabilities).sum(-1)


def _chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shape: LogitShape,
    with_entropy: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies; these are empty if they are not asked for."""
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden has {hidden.shape[0]} positions, but targets has shape {tuple(targets.shape)}.")
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    at_once = torch.is_grad_enabled() and hidden.requires_grad and not trains and not with_entropy
    settings = shape, with_entropy, chunk_size, at_once
    logps, entropies = _LinearLogps.apply(hidden, weight, bias, targets, *settings)  # type: ignore[no-untyped-call]
    return logps, entropies


class _LinearLogps(torch.autograd.Function):
    """Chunked log-probabilities and entropies; nothing of size V is kept between the passes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: LogitShape,
        with_entropy: bool,
        chunk_size: int | None,
        at_once: bool,
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities, and the entropies, which are empty if not asked for."""
        # At once: the gradient of each log-probability by its hidden state is kept, not what that is made of.
        gradients = HeadGradients(hidden, weight, bias, (at_once, False, False))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        logps = hidden.new_empty(len(targets), dtype=dtype)
        entropies = hidden.new_empty(len(targets) if with_entropy else 0, dtype=dtype)
        for part, chunk, product in _products(hidden, weight, bias, chunk_size):
            if with_entropy:
                logps[part], entropies[part] = _logps_and_entropies_(product, targets[part], shape)
                continue
            losses, _, at_target = _loss_and_gradient_(product, targets[part], shape, with_gradient=at_once)
            logps[part] = -losses
            if at_once:
                _put_(product, targets[part], at_target)
                gradients.add(part, (chunk, weight), product, torch.full_like(losses, -shape.factor))
        ctx.at_once, ctx.settings = at_once, (shape, with_entropy, chunk_size)
        ctx.save_for_backward(*((gradients.hidden,) if at_once else (hidden, weight, bias, targets)))
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of a token's log-probability: one-hot minus softmax; of an entropy H: -p (log p + H)."""
        if ctx.at_once:
            (grad_hidden,) = ctx.saved_tensors
            return grad_hidden * grad_logps.to(grad_hidden.dtype)[:, None], *(None,) * 7
        hidden, weight, bias, targets = ctx.saved_tensors
        shape, with_entropy, chunk_size = ctx.settings
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for part, chunk, product in _products(hidden, weight, bias, chunk_size):
            if with_entropy:
                at_target = _logps_gradient_(product, targets[part], grad_logps[part], grad_entropies[part], shape)
                factors = torch.full_like(grad_logps[part], shape.factor)
            else:
                _, _, at_target = _loss_and_gradient_(product, targets[part], shape)
                factors = grad_logps[part] * -shape.factor
            _put_(product, targets[part], at_target)
            gradients.add(part, (chunk, weight), product, factors)
        return *gradients.sums(), *(None,) * 5


@compiled_on_gpu
def _logps_and_entropies_(product: Tensor, targets: Tensor, shape: LogitShape) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of each position's distribution, [C]; overwrites the product."""
    logits = wide(product)
    shape_logits_(logits, shape)
    logits.sub_(logits.logsumexp(1, keepdim=True))
    return logits.gather(1, targets[:, None]).squeeze(1), -(logits.exp() * logits).sum(1)


@compiled_on_gpu
def _logps_gradient_(
    product: Tensor, targets: Tensor, grad_logps: Tensor, grad_entropies: Tensor, shape: LogitShape
) -> Tensor:
    """Gradient by the product at each target, [C, 1]; the product becomes that everywhere else.

    Args:
        product: Of hidden states and weight, [C, V].
        targets: Token ids, [C].
        grad_logps: Of the loss by their log-probabilities, [C].
        grad_entropies: By the entropies, [C].
        shape: What becomes of the product; the gradient lacks `shape.factor`.
    """
    logits, column = wide(product), targets[:, None]
    slope = shape_logits_(logits, shape, with_slope=True)
    log_probabilities = logits.sub_(logits.logsumexp(1, keepdim=True))
    probabilities = log_probabilities.exp()
    entropies = -(probabilities * log_probabilities).sum(1, keepdim=True)
    gradient = log_probabilities.add_(entropies).mul_(-grad_entropies[:, None]).sub_(grad_logps[:, None])
    gradient *= probabilities
    at_target = gradient.gather(1, column) + grad_logps[:, None]
    if slope is not None:
        at_target = at_target * slope.gather(1, column)
        gradient *= slope
    product.copy_(gradient)
    return at_target
