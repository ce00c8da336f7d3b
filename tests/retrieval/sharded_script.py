"""Search in an index of which each of two gloo ranks holds a part. Started by test_search.py."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_alignment.retrieval.index import PassageIndex
from lit_alignment.retrieval.search import exact_search


def search(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    index = PassageIndex.load(folder)
    generator = torch.Generator().manual_seed(rank)
    for number in ((3, 2), (1, 0), (2, 2)):  # unequal numbers of questions, and once none
        queries = torch.randn(number[rank], 8, generator=generator)
        for k in (1, 5, len(index)):
            found, expected = index.search(queries, k, together=True), exact_search(queries, index.shards, k)
            torch.testing.assert_close(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    mp.spawn(search, (sys.argv[1],), nprocs=2)
