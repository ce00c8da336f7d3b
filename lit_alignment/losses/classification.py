"""Losses of classifiers, one value an example, so that whoever averages them decides over what.

B examples, K classes
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 0.0,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of each example, weighted by its class and by how wrong the model is about it.

    loss_b = alpha_y * (1 - p_y)^gamma * CE_b,   CE_b = -(1 - s) log p_y - s / K * sum_k log p_k

    p_y is the probability of the true class, from the logits alone: taken from the weighted cross-entropy, as in
    several implementations, it would be p_y^alpha. With gamma 0 this is the ordinary weighted cross-entropy; unlike
    torch's it is not divided by the sum of the class weights, so a mean over it is a mean over examples.

    Args:
        logits: Scores of the classes, [B, K]; the softmax is taken in fp32.
        targets: Indices of the true classes, [B].
        gamma: How strongly easy examples are down-weighted; the paper uses 2.
        class_weights: alpha, [K]; None means 1.
        label_smoothing: s, the probability spread evenly over the classes.

    Returns:
        Nats, fp32, [B].

    Source: Lin et al. 2017 (arXiv:1708.02002).
    """
    logits = logits.float()
    losses = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if gamma:
        log_p = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        # Not 1 - exp(log_p), which is 0 for a sure model, where the derivative of a power below 1 has no value.
        losses = losses * (-torch.expm1(log_p)).clamp_min(1e-12) ** gamma
    return losses if class_weights is None else losses * class_weights.to(losses)[targets]


def multi_label_loss(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Binary cross-entropy of each example, a mean over its labels.

    loss_b = 1/K sum_k alpha_k * [-t log sigmoid(z) - (1 - t) log sigmoid(-z)],   t = y (1 - s) + s / 2

    Args:
        logits: Score of each label, [B, K].
        targets: 1 where the label applies, else 0, [B, K].
        class_weights: alpha, [K]; None means 1.
        label_smoothing: s, how far targets are moved towards 1/2.

    Returns:
        Nats, fp32, [B].
    """
    smooth = targets.float() * (1 - label_smoothing) + label_smoothing / 2
    losses = binary_cross_entropy_with_logits(logits.float(), smooth, reduction="none")
    return (losses if class_weights is None else losses * class_weights.to(losses)).mean(-1)


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each example, a mean over its quantities, fp32, [B].

    Args:
        predictions: [B, K].
        targets: [B, K].
    """
    return (predictions.float() - targets.float()).square().mean(-1)


def balanced_class_weights(counts: Tensor) -> Tensor:
    """Class weights under which each class that occurs has the same part in the loss, and their mean is 1.

    alpha_k = n / (K' * n_k), where n counts examples and K' the classes that occur; 1 for a class without examples.

    Args:
        counts: Examples of each class, [K].
    """
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp_min(1).float())
    return torch.where(present, weights, torch.ones_like(weights))
