"""Next-token losses over a large vocabulary, without ever holding [N, V].

N trained positions, V vocabulary, D width
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

CHUNK_SIZE = 256  # positions whose logits exist at one time


def wide(values: Tensor) -> Tensor:
    """The values in fp32, or in fp64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """What is computed on the tensor's device keeps the precision of its inputs; devices without autocast always do."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


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
    chunk_size: int = CHUNK_SIZE,
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
        chunk_size: Positions a chunk.

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
        hidden, weight, bias, targets, weights, label_smoothing, scale, softcap, chunk_size
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
        scale: float,
        softcap: float | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Loss and hits; the gradients go to `ctx`."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sums = torch.promote_types(weight.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=sums)
        hits = targets.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # A sum over many chunks: at least fp32, or a bf16 gradient loses its small terms.
        grad_weight = torch.zeros_like(weight, dtype=sums) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if needs_bias and bias is not None else None

        buffer = weight.new_empty(min(chunk_size, len(targets)), len(weight)) if bias is None else None
        for start in range(0, len(targets), chunk_size):
            part = slice(start, start + chunk_size)
            chunk = hidden[part].to(weight.dtype)
            # Under autocast the product would be cast back to bf16 anyway: weight's dtype decides.
            with without_autocast(hidden):
                logits = chunk_logits(chunk, weight, bias, buffer)  # [C, V]
            shape_logits_(logits, scale, softcap)
            hits += (logits.argmax(-1) == targets[part]).sum()
            capped = logits.clone() if softcap is not None else None
            row_weights = None if weights is None else weights[part]
            total += _loss_and_gradient_(logits, targets[part], row_weights, label_smoothing)
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            if softcap is not None and capped is not None:
                logits *= 1 - (capped / softcap) ** 2
            if scale != 1.0:
                logits *= scale
            grad_logits = logits.to(weight.dtype)
            with without_autocast(hidden):
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_logits @ weight).to(hidden.dtype)
                if grad_weight is not None:
                    add_product_(grad_weight, grad_logits, chunk)
                if grad_bias is not None:
                    grad_bias += logits.sum(0)

        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_hits: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the loss."""
        scaled = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None)


def chunk_logits(chunk: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """Logits of one chunk, [C, V], at least in fp32; through one buffer: fresh memory each time costs page faults."""
    if buffer is None:
        return wide(torch.nn.functional.linear(chunk, weight, bias))
    return wide(torch.mm(chunk, weight.T, out=buffer[: len(chunk)]))


def add_product_(total: Tensor, grad_logits: Tensor, chunk: Tensor) -> None:
    """Add a chunk's gradient of the weight, [V, D]; in one precision without a second matrix of that size."""
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits.T, chunk)
    else:
        total += grad_logits.T @ chunk


def _loss_and_gradient_(logits: Tensor, targets: Tensor, weights: Tensor | None, label_smoothing: float) -> Tensor:
    """Return the chunk's summed loss and overwrite `logits` [C, V] with its gradient."""
    target_logits = logits.gather(1, targets[:, None]).squeeze(1)
    mean_logits = logits.mean(1) if label_smoothing else target_logits
    top = logits.amax(1, keepdim=True)
    logits.sub_(top).exp_()
    normaliser = logits.sum(1, keepdim=True)
    log_normaliser = (normaliser.log() + top).squeeze(1)
    losses = log_normaliser - torch.lerp(target_logits, mean_logits, label_smoothing)
    logits.div_(normaliser)
    if label_smoothing:
        logits.sub_(label_smoothing / logits.shape[1])
    rows = torch.arange(len(targets), device=targets.device)
    logits[rows, targets] -= 1 - label_smoothing
    if weights is None:
        return losses.sum()
    logits.mul_(weights[:, None])
    return (losses * weights).sum()


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
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
        chunk_size: Positions a chunk.

    Returns:
        Nats, fp32 (fp64 for fp64 weights), [N], with gradient.

    Raises:
        ValueError: If the number of targets differs from the number of hidden states.
    """
    logps, _ = _chunked_logps(hidden, weight, targets, bias, scale, softcap, temperature, False, chunk_size)
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
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """What `linear_logps` returns, and the entropy of each position's distribution, [N] each, both with gradient."""
    return _chunked_logps(hidden, weight, targets, bias, scale, softcap, temperature, True, chunk_size)


def token_logps_and_entropies(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form of `linear_logps_and_entropies`, for models whose logits are not one matrix product.

    Args:
        logits: [N, V]; the softmax is taken in fp32 at least.
        targets: Token ids, [N].
    """
    log_probabilities = wide(logits).log_softmax(-1)
    logps = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    return logps, -(log_probabilities.exp() * log_probabilities).sum(-1)


def _chunked_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies; these are empty if they are not asked for."""
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden has {hidden.shape[0]} positions, but targets has shape {tuple(targets.shape)}.")
    bias, scale, softcap, temperature, with_entropy, chunk_size = settings
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    at_once = torch.is_grad_enabled() and hidden.requires_grad and not trains and not with_entropy
    shape = scale, softcap, temperature, with_entropy, chunk_size, at_once
    logps, entropies = _LinearLogps.apply(hidden, weight, bias, targets, *shape)  # type: ignore[no-untyped-call]
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
        scale: float,
        softcap: float | None,
        temperature: float,
        with_entropy: bool,
        chunk_size: int,
        at_once: bool,
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities, and the entropies, which are empty if not asked for."""
        # At once: the gradient of each log-probability by its hidden state is kept, not what that is made of.
        grad_hidden = torch.empty_like(hidden) if at_once else None
        ctx.at_once = at_once
        ctx.save_for_backward(*((grad_hidden,) if at_once else (hidden, weight, bias, targets)))
        ctx.shape = scale, softcap, temperature, with_entropy, chunk_size
        dtype = torch.promote_types(weight.dtype, torch.float32)
        logps = hidden.new_empty(len(targets), dtype=dtype)
        entropies = hidden.new_empty(len(targets) if with_entropy else 0, dtype=dtype)
        buffer = weight.new_empty(min(chunk_size, len(targets)), len(weight)) if bias is None else None
        for start in range(0, len(targets), chunk_size):
            part = slice(start, start + chunk_size)
            with without_autocast(hidden):
                logits = chunk_logits(hidden[part].to(weight.dtype), weight, bias, buffer)
            slope = shape_logits_(logits, scale, softcap, temperature, with_slope=at_once)
            target_logits = logits.gather(1, targets[part, None]).squeeze(1)
            if with_entropy:
                normaliser = logits.logsumexp(1)
                logits.sub_(normaliser[:, None])
                entropies[part] = -(logits.exp() * logits).sum(1)
            else:  # in place: logsumexp takes twice as long
                top = logits.amax(1)
                total = logits.sub_(top[:, None]).exp_().sum(1)
                normaliser = total.log() + top
            logps[part] = target_logits - normaliser
            if grad_hidden is not None:
                logits.div_(total[:, None])
                logits[torch.arange(len(logits), device=logits.device), targets[part]] -= 1
                grad_logits = logits.mul_(slope).neg_().to(weight.dtype)
                with without_autocast(hidden):
                    grad_hidden[part] = (grad_logits @ weight).to(hidden.dtype)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of a token's log-probability: one-hot minus softmax; of an entropy H: -p (log p + H)."""
        if ctx.at_once:
            (grad_hidden,) = ctx.saved_tensors
            return grad_hidden * grad_logps.to(grad_hidden.dtype)[:, None], *(None,) * 9
        hidden, weight, bias, targets = ctx.saved_tensors
        scale, softcap, temperature, with_entropy, chunk_size = ctx.shape
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad_logps.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_logps.dtype) if needs_bias and bias is not None else None
        buffer = weight.new_empty(min(chunk_size, len(targets)), len(weight)) if bias is None else None
        for start in range(0, len(targets), chunk_size):
            part = slice(start, start + chunk_size)
            chunk = hidden[part].to(weight.dtype)
            with without_autocast(hidden):
                logits = chunk_logits(chunk, weight, bias, buffer)
                slope = shape_logits_(logits, scale, softcap, temperature, with_slope=True)
                extra = _entropy_gradient(logits, grad_entropies[part]) if with_entropy else None
                # The gradient of minus the log-probability, which is what the cross-entropy's is.
                _loss_and_gradient_(logits, targets[part], -grad_logps[part], 0.0)
                grad_logits = (logits if extra is None else logits.add_(extra)).mul_(slope).to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_logits @ weight).to(hidden.dtype)
                if grad_weight is not None:
                    add_product_(grad_weight, grad_logits, chunk)
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            *(None,) * 7,
        )


def _entropy_gradient(logits: Tensor, grad_entropies: Tensor) -> Tensor:
    """Gradient of the entropies by the logits, [C, V], times that of the loss by the entropies, [C]."""
    log_probabilities = logits.log_softmax(1)
    probabilities = log_probabilities.exp()
    entropies = -(probabilities * log_probabilities).sum(1, keepdim=True)
    return log_probabilities.add_(entropies).mul_(probabilities).mul_(-grad_entropies[:, None])


def shape_logits_(
    logits: Tensor, scale: float, softcap: float | None, temperature: float = 1.0, with_slope: bool = False
) -> Tensor | float:
    """Scale, soft cap and temperature, in place; returns the derivative by what the logits were, if it is wanted."""
    if scale != 1.0:
        logits *= scale
    slope: Tensor | float = scale / temperature
    if softcap is not None:
        logits.div_(softcap).tanh_()
        if with_slope:
            slope = (1 - logits**2).mul_(slope)
        logits.mul_(softcap)
    if temperature != 1.0:
        logits.div_(temperature)
    return slope
