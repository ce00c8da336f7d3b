"""The loss of the toy method: plain tensors, torch only."""

from torch import Tensor


def focal_token_loss(logps: Tensor, gamma: float) -> Tensor:
    """Cross-entropy of each token, down-weighted where the model is sure of it, [N].

    loss = -(1 - p)^gamma log p

    Args:
        logps: log p of each target, [N].
        gamma: Strength; 0 is plain cross-entropy.

    Source: Lin et al. 2017 (arXiv:1708.02002), for tokens.
    """
    return -((1 - logps.exp()) ** gamma) * logps
