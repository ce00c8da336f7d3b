"""How well a ranking of passages finds the relevant ones.

B questions, K passages of a question
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def ranking_metrics(found: Sequence[str], relevant: Collection[str], ks: Sequence[int]) -> dict[str, float]:
    """Recall at each k, reciprocal rank, and nDCG of one question.

    recall@k = |relevant among the first k| / |relevant|;  mrr = 1 / rank of the first relevant one, 0 if there is none;
    ndcg@K = sum_i rel_i / log2(i + 1), over the same with all relevant ones first, K = max(ks)

    Args:
        found: Ids, best first; at least max(ks) of them, if there are as many. One that is there again is no hit.
        relevant: Ids of the passages that answer the question; at least one.
        ks: Where to cut.

    Raises:
        ValueError: If nothing is relevant: then no ranking is better than another.
    """
    wanted = set(relevant)
    if not wanted:
        raise ValueError("no passage is relevant, so the ranking cannot be judged.")
    found = found[: max(ks)]
    hits = [passage in wanted and passage not in found[:rank] for rank, passage in enumerate(found)]
    metrics = {f"recall@{k}": sum(hits[:k]) / len(wanted) for k in ks}
    metrics["mrr"] = next((1 / rank for rank, hit in enumerate(hits, start=1) if hit), 0.0)
    gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits, start=1) if hit)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(wanted), max(ks)) + 1))
    metrics[f"ndcg@{max(ks)}"] = gain / ideal
    return metrics


def retrieval_sums(
    retrieved: Sequence[Sequence[str]],
    relevant: Sequence[Sequence[str]],
    weights: Sequence[float],
    scores: Tensor,
    ks: Sequence[int],
) -> dict[str, tuple[Tensor, float]]:
    """Sums over questions and their numbers by name: `passage_entropy`, and `mrr` and `recall@k` of those judged.

    Args:
        retrieved: Ids of the passages of each question, best first.
        relevant: Ids of those that are relevant; none where that is not known.
        weights: Weight of each question; 0 for a dummy question, which does not count.
        scores: Scores of the passages, [B, K].
        ks: The k of recall@k.
    """
    log_prior = scores.detach().log_softmax(-1)
    counted = torch.tensor(weights).to(scores, non_blocking=True)
    entropy = -(log_prior.exp() * log_prior).sum(-1)
    sums = {"passage_entropy": ((entropy * counted).sum(), float(sum(weights)))}
    judged = [
        ranking_metrics(ids, wanted, ks)
        for ids, wanted, weight in zip(retrieved, relevant, weights, strict=True)
        if wanted and weight
    ]
    for name in ["mrr", *(f"recall@{k}" for k in ks)]:
        sums[name] = scores.new_full((), sum(metrics[name] for metrics in judged)), float(len(judged))
    return sums
