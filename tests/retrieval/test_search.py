"""Exact search against sorting everything, and FAISS against exact search."""

import pytest
import torch
import torch.distributed as dist

from lit_alignment.errors import ConfigError
from lit_alignment.retrieval.index import IndexConfig, PassageIndex
from lit_alignment.retrieval.search import exact_search
from tests.helpers import knowledge_index
from tests.helpers.ranks import run_on_ranks


def sorted_by_hand(queries, embeddings, k):
    scores = queries @ embeddings.T
    places = scores.argsort(dim=1, descending=True)[:, :k]
    return scores.gather(1, places), places


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_exact_search_is_sorting_of_all_scores(block, k):
    generator = torch.Generator().manual_seed(0)
    embeddings, queries = torch.randn(300, 8, generator=generator), torch.randn(4, 8, generator=generator)
    scores, places = exact_search(queries, [embeddings[:100], embeddings[100:101], embeddings[101:]], k, block)
    expected = sorted_by_hand(queries, embeddings, k)
    torch.testing.assert_close(scores, expected[0])
    assert torch.equal(places, expected[1])


def test_passages_in_rising_order_are_all_found():
    """Each block beats all before it."""
    embeddings = torch.arange(100.0)[:, None]
    _, places = exact_search(torch.ones(2, 1), [embeddings], 3, block=10)
    assert places.tolist() == [[99, 98, 97]] * 2


def test_more_passages_than_there_are_is_refused():
    with pytest.raises(ValueError, match="5 passages were asked for, and there are 3"):
        exact_search(torch.ones(1, 2), [torch.ones(3, 2)], 5)


@pytest.mark.parametrize("search", ["flat", "ivf", "hnsw"])
def test_faiss_finds_what_exact_search_finds(search, tmp_path):
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(400, 16, generator=generator), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=1)
    config = IndexConfig(str(tmp_path / "index"), search=search, num_clusters=8, num_probes=6, rows_per_shard=150)
    found = PassageIndex.load(knowledge_index(config, embeddings))
    scores, places = found.search(queries, 5)
    expected = sorted_by_hand(queries, embeddings, 5)
    shared = sum(len({*a} & {*b}) for a, b in zip(places.tolist(), expected[1].tolist(), strict=True)) / 100
    assert shared == 1 if search == "flat" else shared > 0.8
    torch.testing.assert_close(scores, (queries[:, None] * found.embeddings(places)).sum(-1))


def test_search_in_too_few_clusters_still_gives_k_passages(tmp_path):
    pytest.importorskip("faiss")
    embeddings = torch.nn.functional.normalize(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    config = IndexConfig(str(tmp_path / "index"), search="ivf", num_clusters=20, num_probes=1)
    found = PassageIndex.load(knowledge_index(config, embeddings))
    scores, places = found.search(embeddings[:3], 30)
    assert places.min() >= 0 and scores.isfinite().all()
    assert all(len(set(row)) == 30 for row in places.tolist())


def search_in_parts(folder):
    """On each of two ranks, which holds a part of the index."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    index = PassageIndex.load(folder)
    generator = torch.Generator().manual_seed(rank)
    for number in ((3, 2), (1, 0), (2, 2)):  # unequal numbers of questions, and once none
        queries = torch.randn(number[rank], 8, generator=generator)
        for k in (1, 5, len(index)):
            found, expected = index.search(queries, k, together=True), exact_search(queries, index.shards, k)
            torch.testing.assert_close(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    dist.destroy_process_group()


@pytest.mark.slow
def test_index_in_parts_finds_what_the_whole_finds(tmp_path):
    embeddings = torch.randn(23, 8, generator=torch.Generator().manual_seed(0))
    folder = knowledge_index(IndexConfig(str(tmp_path / "index"), rows_per_shard=10), embeddings)
    run_on_ranks(search_in_parts, folder)


def test_parts_of_an_approximate_index_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="index.sharded: only exact search has parts"):
        IndexConfig(str(tmp_path), search="hnsw", sharded=True)
