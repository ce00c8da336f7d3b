"""How well a ranking of passages finds the relevant ones.

K passages of a question
"""

import math
from collections.abc import Collection, Sequence


def ranking_metrics(found: Sequence[str], relevant: Collection[str], ks: Sequence[int]) -> dict[str, float]:
    """Recall at each k, reciprocal rank, and nDCG of one question.

    recall@k = |relevant among the first k| / |relevant|;  mrr = 1 / rank of the first relevant one, 0 if there is none;
    ndcg@K = sum_i rel_i / log2(i + 1), over the same with all relevant ones first, K = max(ks)

    Args:
        found: Ids, best first; at least max(ks) of them, if there are as many.
        relevant: Ids of the passages that answer the question; at least one.
        ks: Where to cut.

    Raises:
        ValueError: If nothing is relevant: then no ranking is better than another.
    """
    wanted = set(relevant)
    if not wanted:
        raise ValueError("no passage is relevant, so the ranking cannot be judged.")
    found = found[: max(ks)]
    hits = [passage in wanted for passage in found]
    metrics = {f"recall@{k}": sum(hits[:k]) / len(wanted) for k in ks}
    metrics["mrr"] = next((1 / rank for rank, hit in enumerate(hits, start=1) if hit), 0.0)
    gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits, start=1) if hit)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(wanted), max(ks)) + 1))
    metrics[f"ndcg@{max(ks)}"] = gain / ideal
    return metrics
