"""Rankings of passages, with their numbers worked by hand."""

from math import log, log2

import pytest
import torch

from lit_alignment.metrics.retrieval import ranking_metrics, retrieval_sums


def test_ranking_by_hand():
    """Relevant a, b, c; found x a y b, and c only after the cut."""
    found = ranking_metrics(["x", "a", "y", "b", "c"], ["a", "b", "c"], [1, 2, 3, 4])
    gain = 1 / log2(3) + 1 / log2(5)  # ranks 2 and 4
    ideal = 1 / log2(2) + 1 / log2(3) + 1 / log2(4)
    expected = {"recall@1": 0, "recall@2": 1 / 3, "recall@3": 1 / 3, "recall@4": 2 / 3}
    assert found == pytest.approx(expected | {"mrr": 1 / 2, "ndcg@4": gain / ideal})


@pytest.mark.parametrize(("rank", "reciprocal"), [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 0)])
def test_one_relevant_passage_counts_by_its_rank_up_to_the_largest_cut(rank, reciprocal):
    passages = ["x", "y", "z", "w"]
    found = ranking_metrics(passages, [passages[rank - 1]], [1, 3])
    recalls = {"recall@1": float(rank <= 1), "recall@3": float(rank <= 3)}
    assert found == pytest.approx(recalls | {"mrr": reciprocal, "ndcg@3": 1 / log2(rank + 1) if rank <= 3 else 0})


def test_passage_that_is_found_again_is_no_second_hit():
    found = ranking_metrics(["a", "a", "b", "c"], ["a", "b"], [2, 4])
    assert found["recall@2"] == 0.5 and found["recall@4"] == 1.0 and found["ndcg@4"] < 1
    assert ranking_metrics(["x", "a", "a"], ["a"], [3])["recall@3"] == 1.0


def test_ideal_ranking_holds_no_more_than_the_cut():
    """Three relevant passages, and a cut at two: two relevant ones are all that can be had."""
    found = ranking_metrics(["a", "b"], ["a", "b", "c"], [2])
    assert found == pytest.approx({"recall@2": 2 / 3, "mrr": 1, "ndcg@2": 1})


def test_ranking_without_a_relevant_passage_is_refused():
    with pytest.raises(ValueError, match="no passage is relevant"):
        ranking_metrics(["a"], [], [1])


def test_sums_are_over_the_questions_that_count_and_whose_relevant_passages_are_known():
    """Of four questions one is a dummy, and of another nothing relevant is known.

    Evenly spread over two passages the entropy is log 2; all on one it is 0.
    """
    retrieved = [["a", "b"], ["b", "a"], ["a", "b"], ["a", "b"]]
    scores = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [1000.0, 0.0]])
    found = retrieval_sums(retrieved, [["a"], ["a", "c"], ["a"], []], [1.0, 1.0, 0.0, 1.0], scores, [1, 2])
    expected = {"passage_entropy": (2 * log(2), 3), "mrr": (1.5, 2), "recall@1": (1, 2), "recall@2": (1.5, 2)}
    assert {name: (float(total), float(number)) for name, (total, number) in found.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }
