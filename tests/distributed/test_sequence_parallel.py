"""Ranks that share a row compute the attention of the whole row."""

import pytest
import torch
from transformers import AutoConfig

from lit_alignment.errors import ConfigError
from lit_alignment.models.attention import check_sequence_parallel
from tests.distributed.sequence_script import CASES, RANKS
from tests.helpers import run_on_ranks


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks("distributed.sequence_script", str(folder))
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
