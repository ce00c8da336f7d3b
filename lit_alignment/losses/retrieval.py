"""Objectives that train a retriever alone or with a generator, one value a question.

B questions, K passages, T answer tokens, N passages in a batch

p(z_k) = softmax(scores)_k is the retriever's distribution over the K passages of a question; scores are already divided
by the retriever's temperature. With K = 1 it is constant, and no objective trains a retriever.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_alignment.losses.chunks import wide


def rag_sequence_loss(scores: Tensor, answer_logps: Tensor) -> Tensor:
    """Negative log-likelihood of the answer, with one passage behind all of it and all passages summed over.

    loss_b = -log sum_k p(z_k) p(y | x, z_k)

    Args:
        scores: Retrieval scores, [B, K].
        answer_logps: log p(y | x, z_k), summed over the answer's tokens, [B, K].

    Returns:
        Nats a question, fp32, [B].

    Raises:
        ValueError: If the shapes differ.

    Source: Lewis et al. 2020 (arXiv:2005.11401). transformers' own RAG loss does not divide scores by a temperature,
    and turbo-alignment's read the log-probability of each token one position too early.
    """
    _same_shape(scores, answer_logps)
    return -(wide(scores).log_softmax(-1) + wide(answer_logps)).logsumexp(-1)


def rag_token_loss(scores: Tensor, token_logps: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood of the answer, with the passages summed over anew for each token.

    loss_b = -sum_t w_t log sum_k p(z_k) p(y_t | x, z_k, y_<t)

    Args:
        scores: Retrieval scores, [B, K].
        token_logps: log p(y_t | x, z_k, y_<t), [B, K, T]; anything finite where the weight is 0.
        weights: Weight of each token, 0 on padding, [B, T].

    Returns:
        Nats a question, fp32, [B].

    Raises:
        ValueError: If the shapes do not fit.

    Source: Lewis et al. 2020 (arXiv:2005.11401).
    """
    if token_logps.shape != (*scores.shape, weights.shape[-1]) or weights.shape[0] != scores.shape[0]:
        raise ValueError(
            f"scores {tuple(scores.shape)}, token_logps {tuple(token_logps.shape)} and weights {tuple(weights.shape)} "
            "must be [B, K], [B, K, T] and [B, T]."
        )
    by_token = (wide(scores).log_softmax(-1)[..., None] + wide(token_logps)).logsumexp(1)  # [B, T]
    return -(by_token * weights).sum(-1)


def emdr2_loss(scores: Tensor, answer_logps: Tensor) -> Tensor:
    """The RAG-Sequence likelihood as a loss of the retriever alone: no gradient reaches the generator.

    loss_b = -log sum_k p(z_k) stop_gradient(p(y | x, z_k))

    Its gradient by the scores is p(z_k) - p(z_k | x, y): the prior is pulled towards the posterior.

    Args:
        scores: Retrieval scores, [B, K].
        answer_logps: log p(y | x, z_k), [B, K].

    Returns:
        Nats a question, fp32, [B].

    Source: Singh et al. 2021 (arXiv:2106.05346), the second term of its equation 5; the first is the generator's
    own loss on all passages together.
    """
    return rag_sequence_loss(scores, answer_logps.detach())


def perplexity_distillation_loss(scores: Tensor, answer_logps: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of the retriever from what the generator makes of each passage by itself.

    loss_b = KL(q || p),   q = stop_gradient(softmax_k(log p(y | x, z_k) / temperature))

    Args:
        scores: Retrieval scores, [B, K].
        answer_logps: log p(y | x, z_k), or its mean over the answer's tokens, [B, K].
        temperature: Above 1 flattens the target.

    Returns:
        Nats a question, fp32, [B].

    Source: PDist of Izacard et al. 2022 (Atlas, arXiv:2208.03299), section 2.2.
    """
    return _divergence((wide(answer_logps.detach()) / temperature).log_softmax(-1), scores)


def leave_one_out_loss(scores: Tensor, without_logps: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of the retriever from how much worse the answer becomes without each passage.

    loss_b = KL(q || p),   q = stop_gradient(softmax_k(-log p(y | x, all passages but z_k) / temperature))

    Args:
        scores: Retrieval scores, [B, K].
        without_logps: log p(y | x, z_1..z_K without z_k), or its mean over the answer's tokens, [B, K].
        temperature: Above 1 flattens the target.

    Returns:
        Nats a question, fp32, [B].

    Source: LOOP of Izacard et al. 2022 (Atlas, arXiv:2208.03299), section 2.2.
    """
    return perplexity_distillation_loss(scores, -without_logps, temperature)


def replug_loss(scores: Tensor, answer_logps: Tensor, temperature: float = 0.1) -> Tensor:
    """Divergence from the language model's preference among the passages to the retriever, in REPLUG's direction.

    loss_b = KL(p || q),   q = stop_gradient(softmax_k(p(y | x, z_k) / temperature))

    q is a softmax of probabilities, as in the paper, so it is nearly even where all are small: give the mean of the
    token log-probabilities, whose exponential is the inverse perplexity.

    Args:
        scores: Retrieval scores, [B, K].
        answer_logps: log p(y | x, z_k), or its mean over the answer's tokens, [B, K].
        temperature: The paper's beta.

    Returns:
        Nats a question, fp32, [B].

    Source: LSR of Shi et al. 2023 (REPLUG, arXiv:2301.12652), section 4.
    """
    _same_shape(scores, answer_logps)
    target = (wide(answer_logps.detach()).exp() / temperature).log_softmax(-1)
    log_prior = wide(scores).log_softmax(-1)
    return (log_prior.exp() * (log_prior - target)).sum(-1)


def info_nce_loss(scores: Tensor, positives: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each question's own passage among all passages of a batch.

    loss_b = -log [exp(s_b,pos) / sum_n exp(s_b,n)]

    Args:
        scores: Similarity of each question with each passage of the batch, divided by the temperature, [B, N].
        positives: Position of each question's own passage, [B].
        excluded: True where a passage is no negative of a question, since it is a copy of its own one, [B, N]; the
            own position itself always counts.

    Returns:
        Nats a question, fp32, [B].

    Source: van den Oord et al. 2018 (arXiv:1807.03748); in-batch negatives: Karpukhin et al. 2020 (arXiv:2004.04906).
    """
    scores = wide(scores)
    if excluded is not None:
        own = torch.zeros_like(excluded).scatter_(1, positives[:, None], True)
        scores = scores.masked_fill(excluded & ~own, -torch.inf)
    return cross_entropy(scores, positives, reduction="none")


def _divergence(log_target: Tensor, scores: Tensor) -> Tensor:
    """KL(target || softmax(scores)), [B]."""
    _same_shape(scores, log_target)
    return (log_target.exp() * (log_target - wide(scores).log_softmax(-1))).sum(-1)


def retriever_loss(
    name: str, scores: Tensor, answer_logps: Tensor, mean_logps: Tensor, temperature: float = 1.0
) -> Tensor:
    """Loss of the retriever for each question, [B], by the name of the training objective.

    Args:
        name: `emdr2`, `leave_one_out`, `replug`, or `perplexity_distillation`.
        scores: Scores of the passages, [B, K].
        answer_logps: log p(y | x, z_k), or of all passages but z_k for `leave_one_out`, [B, K].
        mean_logps: Its mean over the answer's tokens, [B, K].
        temperature: Flattens (above 1) what the retriever is distilled from.

    Raises:
        ValueError: If there is no such loss.
    """
    match name:
        case "emdr2":
            return emdr2_loss(scores, answer_logps)
        case "leave_one_out":
            return leave_one_out_loss(scores, mean_logps, temperature)
        case "replug":
            return replug_loss(scores, mean_logps, temperature)
        case "perplexity_distillation":
            return perplexity_distillation_loss(scores, mean_logps, temperature)
    raise ValueError(f"'{name}' is no loss of a retriever.")


def _same_shape(scores: Tensor, logps: Tensor) -> None:
    if scores.shape != logps.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and log-probabilities {tuple(logps.shape)} must be [B, K].")
