"""What is retrieved for a query, and with which scores."""

from dataclasses import replace

import pytest
import torch

from lit_alignment.retrieval.passage_retriever import PassageRetriever
from tests.helpers import RETRIEVER, encoded_index, knowledge

QUERIES = ["order the kitchen scale", "repair", "please reply urgent"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_over_retrieved_passages_are_ranked_by_what_the_encoder_makes_of_them_now(times, tmp_path):
    """The index has the opposite order: two times `times` of its first are looked at, and the best two kept."""
    config = replace(RETRIEVER, temperature=0.5)
    retriever = PassageRetriever(config, encoded_index(tmp_path, knowledge(6)), 2, over_retrieve=times, trained="query")
    encoder = retriever.load()
    now = retriever.index.shards[0].clone()
    retriever.index.shards = [-now]
    with torch.no_grad():
        passages, scores = retriever.retrieve(QUERIES)
        expected = encoder.queries(QUERIES) @ now.T / 0.5
    for found, row, by_position in zip(passages, scores, expected, strict=True):
        looked_at = by_position.argsort()[: 2 * times].tolist()
        kept = sorted(looked_at, key=lambda position: -by_position[position])[:2] if times > 1 else looked_at
        assert [passage.id for passage in found] == [f"p{position}" for position in kept]
        sign = 1 if times > 1 else -1  # what is not encoded anew has the scores of the index
        torch.testing.assert_close(row, sign * by_position[kept], rtol=1e-4, atol=1e-5)
