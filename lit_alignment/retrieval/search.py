"""Exact search by inner product.

B queries, N passages, D width, K passages of a query
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16384  # passages whose scores exist at one time


@torch.no_grad()
def exact_search(queries: Tensor, shards: Sequence[Tensor], k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The K passages with the largest inner products, and these.

    Blocks of passages are scored one after the other. Of each block only those are looked at that beat the K-th best
    so far, so that nearly all time goes into the matrix product.

    Args:
        queries: [B, D]; they are rounded to the type of the embeddings.
        shards: Embeddings in order, [n, D] each, of any floating type, on any device.
        k: K, at most N.
        block: Passages a block.

    Returns:
        Scores, fp32, and places among all passages, both [B, K], best first.

    Raises:
        ValueError: If K is larger than N.
    """
    total = sum(len(shard) for shard in shards)
    if k > total:
        raise ValueError(f"{k} passages were asked for, and there are {total}.")
    best = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
    places = torch.full_like(best, -1, dtype=torch.long)
    start = 0
    for shard in shards:
        for rows in torch.split(shard, block):
            found = (queries.to(rows.dtype) @ rows.T).float()
            scores, own = _candidates(found, best[:, -1:], k)
            best, order = torch.cat([best, scores], 1).topk(k)
            places = torch.cat([places, own + start], 1).gather(1, order)
            start += len(rows)
    return best, places


def _candidates(scores: Tensor, bar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and columns of a block's passages that may be among the best K: [B, M], padded with minus infinity."""
    above = scores > bar
    most = int(above.sum(1).max())
    if most > 4 * k or most == 0:
        top, columns = scores.topk(min(k, scores.shape[1]))
        return top, columns
    row, column = above.nonzero(as_tuple=True)
    slot = torch.arange(len(row), device=row.device) - (above.sum(1).cumsum(0) - above.sum(1))[row]
    kept = scores.new_full((len(scores), most), -torch.inf)
    columns = torch.zeros_like(kept, dtype=torch.long)
    kept[row, slot], columns[row, slot] = scores[row, column], column
    return kept, columns
