"""Heads of ranks that share a row: what each rank needs in order to compute its share alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lit_alignment.models.collectives import spread


@pytest.mark.parametrize(("heads", "key_heads", "ranks"), [(8, 2, 4), (12, 3, 2), (4, 4, 2), (4, 1, 2)])
def test_spread_keys_meet_the_query_heads_of_their_group_on_every_rank(heads, key_heads, ranks):
    """Each rank's part of the heads, by itself, gives its part of plain grouped attention, computed head by head."""
    torch.manual_seed(0)
    query = torch.randn(1, heads, 5, 4)
    key, value = torch.randn(2, 1, key_heads, 5, 4)
    groups = [head // (heads // key_heads) for head in range(heads)]
    pairs = [(query[:, head], key[:, group], value[:, group]) for head, group in enumerate(groups)]
    expected = torch.stack([scaled_dot_product_attention(q, k, v) for q, k, v in pairs], 1)
    wide_key, wide_value = spread(key, value, ranks)
    assert wide_key.shape[1] == wide_value.shape[1] and wide_key.shape[1] % ranks == 0
    parts = zip(query.chunk(ranks, 1), wide_key.chunk(ranks, 1), wide_value.chunk(ranks, 1), strict=True)
    found = torch.cat([scaled_dot_product_attention(q, k, v, enable_gqa=True) for q, k, v in parts], 1)
    torch.testing.assert_close(found, expected)
