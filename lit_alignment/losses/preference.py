"""Losses over pairs of responses, and over responses judged alone: policy optimisation without sampling.

B pairs or responses

A *ratio* is a response's summed log-probability under the policy less that under the reference, the D of the papers; a
*gap* is the chosen ratio less the rejected one, h. A *mean* is a summed log-probability over the number of its tokens.
All return nats, [B], with gradients through the policy only; they are averaged over the pairs of an optimizer step.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

LARGEST_EXPONENT = 80  # exp overflows float32 at 88


def sigmoid_loss(gap: Tensor, beta: float, label_smoothing: float = 0.0, offset: Tensor | float = 0.0) -> Tensor:
    """DPO: the negative log-likelihood that the chosen response is preferred, under the implicit reward beta * ratio.

    loss = -(1 - e) log sigmoid(beta gap - offset) - e log sigmoid(offset - beta gap)

    Args:
        gap: Chosen less rejected ratio, [B]; without a reference that of log-probabilities (CPO), or of their means.
        beta: Strength of the tie to the reference.
        label_smoothing: Share e of pairs whose labels are wrong (conservative DPO).
        offset: How far apart the rewards should be, [B].

    Source: Rafailov et al. 2023 (arXiv:2305.18290); e: Mitchell 2023; offset: Amini et al. 2024 (arXiv:2402.10571).
    """
    logit = beta * gap - offset
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def robust_loss(gap: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO whose expectation is that of clean labels, if a share `label_smoothing` < 1/2 of them is flipped.

    Source: Chowdhury et al. 2024 (arXiv:2403.00409).
    """
    kept, flipped = -logsigmoid(beta * gap), -logsigmoid(-beta * gap)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(gap: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta gap), RSO's loss with a reference and SLiC's without.

    Source: Liu et al. 2023 (arXiv:2309.06657); without: Zhao et al. 2023 (arXiv:2305.10425).
    """
    return relu(1 - beta * gap)


def ipo_loss(gap: Tensor, beta: float) -> Tensor:
    """(gap - 1 / (2 beta))^2, which a finite gap minimises.

    Args:
        gap: Of the means over tokens, as the authors advise; of the sums in the paper, [B].
        beta: The paper's tau.

    Source: Azar et al. 2023 (arXiv:2310.12036).
    """
    return (gap - 1 / (2 * beta)).square()


def exo_pair_loss(gap: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Reverse KL divergence between the policy's preference and the smoothed label; label_smoothing > 0.

    Source: Ji et al. 2024 (arXiv:2402.00856).
    """
    x = beta * gap
    kept = x.sigmoid() * (logsigmoid(x) - math.log1p(-label_smoothing))
    return kept + (-x).sigmoid() * (logsigmoid(-x) - math.log(label_smoothing))


def nca_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Noise contrastive alignment: raises the chosen ratio, and lowers both a little.

    Args:
        chosen: Ratio of the chosen response, [B].
        rejected: Of the other.
        beta: Strength of the tie to the reference.

    Source: Chen et al. 2024 (arXiv:2402.05369).
    """
    return -logsigmoid(beta * chosen) - 0.5 * (logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected))


def bco_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Binary cross-entropy of each response by itself, without the paper's moving shift of rewards.

    Source: Jung et al. 2024 (arXiv:2404.04656).
    """
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Squared distance of each ratio from half of 1 / beta, up for the chosen and down for the rejected response.

    Source: Wu et al. 2024 (arXiv:2405.00675).
    """
    return (chosen - 1 / (2 * beta)).square() + (rejected + 1 / (2 * beta)).square()


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Raises the chosen and lowers the rejected response: for data that are better than the model.

    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266).
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Lowers both responses, the rejected one more: for a model that is better than the data.

    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266).
    """
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def dpop_loss(chosen: Tensor, rejected: Tensor, beta: float, penalty: float) -> Tensor:
    """DPO with a penalty where the chosen response becomes less likely than under the reference.

    Source: Pal et al. 2024 (arXiv:2402.13228).
    """
    return -logsigmoid(beta * (chosen - rejected - penalty * relu(-chosen)))


def cal_dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """A plain log-likelihood of the pair, with each ratio calibrated to half of 1 / beta.

    Source: Xiao et al. 2024 (arXiv:2412.14516).
    """
    return -logsigmoid(chosen - rejected) + sppo_hard_loss(chosen, rejected, beta)


def discopop_loss(gap: Tensor, beta: float, tau: float) -> Tensor:
    """A blend of the logistic and the exponential loss, weighed by sigmoid(beta gap / tau).

    loss = (1 - g)(-log sigmoid(x)) + g exp(-x),   x = beta gap,   g = sigmoid(x / tau)

    Source: Lu et al. 2024 (arXiv:2406.08414).
    """
    x = beta * gap
    exponential = (logsigmoid(x / tau) - x).clamp_max(LARGEST_EXPONENT).exp()  # g exp(-x), whose parts overflow
    return -(-x / tau).sigmoid() * logsigmoid(x) + exponential


def log_odds(mean: Tensor) -> Tensor:
    """Log-odds, log p / (1 - p), of a mean log-probability log p, [B]; above -1e-10 it stays that of -1e-10."""
    mean = mean.clamp_max(-1e-10)
    return mean - (-torch.expm1(mean)).log()


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's second term: -log sigmoid of the difference in log-odds.

    Args:
        chosen: Mean log-probability of the chosen response's tokens, [B].
        rejected: Of the other.

    Source: Hong et al. 2024 (arXiv:2403.07691).
    """
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def absolute_odds_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ASFT's second term: each response's log-odds by themselves.

    Source: Wang et al. 2024 (arXiv:2409.10571).
    """
    return -logsigmoid(log_odds(chosen)) - logsigmoid(-log_odds(rejected))


def alpha_reward(mean: Tensor, power: float) -> Tensor:
    """AlphaPO's reward of a mean log-probability: (1 - exp(-power mean)) / power, and the mean itself for 0.

    Source: Gupta et al. 2025 (arXiv:2501.03884).
    """
    return -torch.expm1((-power * mean).clamp_max(LARGEST_EXPONENT)) / power if power else mean


def distilled_preference_loss(gap: Tensor, margin: Tensor, beta: float, forward: bool = False) -> Tensor:
    """KL divergence between the policy's preference, sigmoid(beta gap), and a reward model's, sigmoid(margin).

    Args:
        gap: Chosen less rejected ratio, [B].
        margin: Chosen less rejected reward, [B].
        beta: Strength of the tie to the reference.
        forward: KL(reward model || policy); else KL(policy || reward model).

    Source: turbo-alignment's DDPO, with logarithms that do not overflow.
    """
    policy, target = beta * gap, margin
    first, second = (target, policy) if forward else (policy, target)
    return first.sigmoid() * (logsigmoid(first) - logsigmoid(second)) + (-first).sigmoid() * (
        logsigmoid(-first) - logsigmoid(-second)
    )


def divergence_ratio(ratio: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """What takes the ratio's place where another divergence than the reverse KL ties the policy to the reference, [B].

    f'(t) of t = exp(ratio), up to a constant: log t for `reverse_kl`, -1 / t for `forward_kl`, log 2t / (1 + t) for
    `js`, and t^(alpha - 1) / (alpha - 1) for `alpha`. Exponents end at LARGEST_EXPONENT.

    Source: Wang et al. 2023 (arXiv:2309.16240).
    """
    match divergence:
        case "forward_kl":
            return -(-ratio).clamp_max(LARGEST_EXPONENT).exp()
        case "js":
            return logsigmoid(ratio) + math.log(2)
        case "alpha":
            return ((alpha - 1) * ratio).clamp_max(LARGEST_EXPONENT).exp() / (alpha - 1)
        case _:
            return ratio


def kto_loss(ratio: Tensor, desirable: Tensor, baseline: Tensor | float, beta: float) -> Tensor:
    """Prospect-theoretic loss of responses judged alone.

    loss = sigmoid(beta (z - ratio)) for a good response, sigmoid(beta (ratio - z)) for a bad one

    Args:
        ratio: [B].
        desirable: Whether each response is good, [B].
        baseline: z, the reference point: an estimate of the policy's KL divergence, without gradient.
        beta: Strength of the tie to the reference.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306); z = 0: D'Oosterlinck et al. 2024 (arXiv:2408.06266).
    """
    return (beta * (ratio - baseline) * torch.where(desirable, -1.0, 1.0).to(ratio)).sigmoid()
