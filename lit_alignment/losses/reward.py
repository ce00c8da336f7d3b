"""Losses of reward models, one value a record, so that whoever averages them decides over what.

B pairs, R rankings, C candidates of a ranking
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood that each chosen response beats its rejected one.

    loss_b = -log sigmoid(chosen_b - rejected_b - margin_b)

    Args:
        chosen: Score of the preferred response, [B].
        rejected: Score of the other response, [B].
        margin: How far apart the pair should be, [B], in score units; None means 0.

    Returns:
        Nats a pair, fp32, [B].

    Raises:
        ValueError: If the shapes differ.

    Source: Ouyang et al. 2022 (arXiv:2203.02155); margin: Touvron et al. 2023 (arXiv:2307.09288).
    """
    if chosen.shape != rejected.shape or (margin is not None and margin.shape != chosen.shape):
        raise ValueError(
            f"chosen {tuple(chosen.shape)}, rejected {tuple(rejected.shape)} and margin must have one shape."
        )
    difference = chosen.float() - rejected.float()
    return -logsigmoid(difference if margin is None else difference - margin.float())


def plackett_luce_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking: the best is chosen among all, the next among the rest, and so on.

    loss = sum_i [ log sum_{j in S_i} exp(s_j) - s_i ],   S_i = {i} and all of lower rank than i

    Candidates of equal rank are not compared with each other. For two candidates this is the Bradley-Terry loss.

    Args:
        scores: Score of each candidate of one record, [C].
        ranks: Their ranks, 1 for the best, [C].

    Returns:
        Nats, fp32 scalar.

    Raises:
        ValueError: If the shapes differ.

    Source: Plackett 1975; for reward models Zhu et al. 2023 (arXiv:2301.11270).
    """
    if scores.shape != ranks.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and ranks {tuple(ranks.shape)} must have one shape.")
    scores = scores.float()
    lower = ranks[None, :] > ranks[:, None]  # [C, C]: j stands below i
    rivals = lower | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return (scores.expand(len(scores), -1).masked_fill(~rivals, -torch.inf).logsumexp(-1) - scores).sum()


def centering_penalty(scores: Tensor) -> Tensor:
    """What keeps the scores of a record around zero, where differences alone would let them drift.

    penalty = (2 * mean of the record's scores)^2, which is (chosen + rejected)^2 for a pair

    Args:
        scores: Score of each candidate of one record, [C].

    Returns:
        fp32 scalar.

    Source: Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    return (2 * scores.float().mean()).square()


def outcome_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each score: of a whole response, or of one step of it.

    loss_b = -y log sigmoid(s) - (1 - y) log sigmoid(-s)

    Args:
        scores: [B].
        labels: 1 for good, 0 for bad, or a probability between, [B].

    Returns:
        Nats, fp32, [B].

    Source: outcomes: Cobbe et al. 2021 (arXiv:2110.14168); steps: Lightman et al. 2023 (arXiv:2305.20050).
    """
    return binary_cross_entropy_with_logits(scores.float(), labels.float(), reduction="none")
