"""Attention of two gloo ranks that share a row, beside that of the whole row. Started by test_sequence_parallel.py."""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_alignment.models.attention import document_attention
from lit_alignment.models.collectives import SequenceGroup

RANKS = 2
# Query heads, key heads, lengths of the documents, and what else the attention gets.
CASES = {
    "grouped": (4, 2, [5, 1, 9], {}),
    "one key head": (4, 1, [5, 1, 9], {}),
    "window": (4, 2, [12, 3], {"sliding_window": 4}),
    "shared prompt": (4, 4, [6, 4, 5], {"document_parents": [-1, 0, 0]}),
    "one token": (2, 2, [1], {}),
}


def compare(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    sequence = SequenceGroup(dist.group.WORLD, rank, RANKS)
    torch.save({name: differing(sequence, *case) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def differing(sequence, heads, key_heads, lengths, settings):
    """Output and gradients of this rank's slice, each beside that of the whole row."""
    torch.manual_seed(0)
    total = sum(lengths)
    own = sequence.own(total)
    whole = [torch.randn(1, n, total, 8, requires_grad=True) for n in (heads, key_heads, key_heads)]
    parts = [tensor.detach()[:, :, own].clone().requires_grad_() for tensor in whole]
    weight = torch.randn(1, total, heads, 8)
    settings = {"document_lengths": lengths, **settings}
    expected, _ = document_attention(torch.nn.Module(), *whole, None, **settings)
    found, _ = document_attention(torch.nn.Module(), *parts, None, sequence=sequence, **settings)
    (expected * weight).sum().backward()
    (found * weight[:, own]).sum().backward()
    gradients = [(part.grad, tensor.grad[:, :, own]) for part, tensor in zip(parts, whole, strict=True)]
    return [(found.detach(), expected.detach()[:, own]), *gradients]


if __name__ == "__main__":
    mp.spawn(compare, (sys.argv[1],), nprocs=RANKS)
