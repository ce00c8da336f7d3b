"""Exact search by inner product.

B queries, N passages, D width, K passages of a query, W processes
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 16384  # passages whose scores exist at one time


@torch.no_grad()
def exact_search(queries: Tensor, shards: Sequence[Tensor], k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The K passages with the largest inner products, and these.

    Blocks of passages are scored one after the other. Of each block only those are looked at, on a CPU, that beat the
    K-th best so far, so that nearly all time goes into the matrix product.

    Args:
        queries: [B, D]; they are rounded to the type of the embeddings, and compared on their device.
        shards: Embeddings in order, [n, D] each, of any floating type.
        k: K, at most N.
        block: Passages a block.

    Returns:
        Scores, fp32, and positions among all passages, both [B, K], best first, on the embeddings' device.

    Raises:
        ValueError: If K is larger than N.
    """
    total = sum(len(shard) for shard in shards)
    if k > total:
        raise ValueError(f"{k} passages were asked for, and there are {total}.")
    queries = queries.to(shards[0].device)
    best = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
    positions = torch.full_like(best, -1, dtype=torch.long)
    if len(queries) == 0:
        return best, positions
    start = 0
    for shard in shards:
        for rows in torch.split(shard, block):
            found = (queries.to(rows.dtype) @ rows.T).float()
            if start == 0 or found.device.type != "cpu":  # to know which beat the K-th best, a GPU would be waited for
                scores, own = found.topk(min(k, len(rows)))
            else:
                scores, own = _candidates(found, best[:, -1:], k)
            best, order = torch.cat([best, scores], 1).topk(k)
            positions = torch.cat([positions, own + start], 1).gather(1, order)
            start += len(rows)
    return best, positions


@torch.no_grad()
def sharded_search(queries: Tensor, part: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """As `exact_search`, where each process holds a part of the passages: all processes call it together.

    Each compares the queries of all with its own part, and all choose from what all have found.

    Args:
        queries: This process's own, [B, D]; each may have another B.
        part: Embeddings of its passages, [n, D].
        start: Position of the first of them among all passages.
        k: K, at most N.

    Returns:
        Scores, fp32, and positions among all passages, both [B, K], best first.
    """
    world = range(dist.get_world_size())
    counts = [torch.zeros((), dtype=torch.long, device=queries.device) for _ in world]
    dist.all_gather(counts, torch.tensor(len(queries), device=queries.device))
    sizes = torch.stack(counts).tolist()
    padded = queries.new_zeros(max(sizes), queries.shape[1])
    padded[: len(queries)] = queries
    everyone = [torch.empty_like(padded) for _ in world]
    dist.all_gather(everyone, padded)
    scores, positions = exact_search(torch.cat(everyone), [part], min(k, len(part)))  # [W * max B, k of this part]
    found = torch.nn.functional.pad(scores, (0, k - scores.shape[1]), value=-torch.inf)
    where = torch.nn.functional.pad(positions + start, (0, k - positions.shape[1]), value=-1)
    all_scores, all_places = [torch.empty_like(found) for _ in world], [torch.empty_like(where) for _ in world]
    dist.all_gather(all_scores, found)
    dist.all_gather(all_places, where)
    first = dist.get_rank() * len(padded)
    own = slice(first, first + len(queries))
    best, order = torch.cat([each[own] for each in all_scores], 1).topk(k)
    return best, torch.cat([each[own] for each in all_places], 1).gather(1, order)


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
