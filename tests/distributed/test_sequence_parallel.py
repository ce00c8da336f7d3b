"""Ranks that share a row compute the attention of the whole row."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from lit_alignment.errors import ConfigError
from lit_alignment.models.attention import check_sequence_parallel, document_attention
from lit_alignment.models.collectives import SequenceGroup
from tests.helpers.ranks import run_on_ranks

RANKS = 2
# Query heads, key heads, lengths of the documents, and what else the attention gets.
CASES = {
    "grouped": (4, 2, [5, 1, 9], {}),
    "one key head": (4, 1, [5, 1, 9], {}),
    "window": (4, 2, [12, 3], {"sliding_window": 4}),
    "shared prompt": (4, 4, [6, 4, 5], {"document_parents": [-1, 0, 0]}),
    "one token": (2, 2, [1], {}),
}


def compare(folder):
    """On each rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sequence = SequenceGroup(dist.group.WORLD, rank, RANKS)
    torch.save({name: differing(sequence, *case) for name, case in CASES.items()}, folder / f"{rank}.pt")
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


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(compare, folder, ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_attention_of_two_ranks_is_that_of_the_whole_row(case, compared):
    """Output, and gradients of queries, keys and values."""
    assert sum(rank[case][0][0].shape[1] for rank in compared) == sum(CASES[case][2])
    for rank in compared:
        for found, expected in rank[case]:
            torch.testing.assert_close(found, expected)


def test_what_cannot_be_shared_is_refused():
    config = AutoConfig.for_model("llama", num_attention_heads=4)
    check_sequence_parallel(config, 2, True, "document_sdpa")
    with pytest.raises(ConfigError, match="size is 3, by which the model's 4 attention heads"):
        check_sequence_parallel(config, 3, True, "document_sdpa")
    with pytest.raises(ConfigError, match="packing: true"):
        check_sequence_parallel(config, 2, False, "document_sdpa")
    with pytest.raises(ConfigError, match="attention: sdpa"):
        check_sequence_parallel(config, 2, True, "flash_attention_2")
