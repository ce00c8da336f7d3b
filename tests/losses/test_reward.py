"""Reward losses against numbers worked by hand and against a slow enumeration."""

import math
from itertools import permutations

import pytest
import torch

from lit_alignment.losses import bradley_terry_loss, centering_penalty, outcome_loss, plackett_luce_loss


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, 0.0])
    # sigmoid(log 3) = 3/4
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx([-math.log(0.75), math.log(2)])


def test_margin_is_taken_off_the_difference_inside_the_sigmoid():
    margin = torch.tensor([math.log(3)])
    found = bradley_terry_loss(torch.tensor([math.log(9)]), torch.tensor([0.0]), margin)
    assert found.item() == pytest.approx(-math.log(0.75))
    scores = torch.zeros(2, requires_grad=True)
    bradley_terry_loss(scores[:1], scores[1:], margin).sum().backward()
    # the gradient is -sigmoid(margin) = -3/4, where without a margin it is -1/2
    assert scores.grad.tolist() == pytest.approx([-0.75, 0.75])


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        plackett_luce_loss(torch.zeros(2), torch.zeros(3))


def test_ranking_of_two_is_bradley_terry():
    scores = torch.tensor([0.3, -1.2])
    pair = bradley_terry_loss(scores[1:], scores[:1])
    assert plackett_luce_loss(scores, torch.tensor([2, 1])).item() == pytest.approx(pair.item())


def test_probabilities_of_all_rankings_sum_to_one():
    torch.manual_seed(0)
    scores = torch.randn(4)
    total = sum(math.exp(-plackett_luce_loss(scores, torch.tensor(ranks))) for ranks in permutations(range(1, 5)))
    assert total == pytest.approx(1.0, abs=1e-5)


def test_ranking_by_a_slow_loop():
    scores, ranks = torch.tensor([0.5, 2.0, -1.0]), [2, 1, 3]
    order = sorted(range(3), key=lambda i: ranks[i])
    expected, left = 0.0, list(order)
    for best in order:
        expected += math.log(sum(math.exp(scores[j]) for j in left)) - float(scores[best])
        left.remove(best)
    assert plackett_luce_loss(scores, torch.tensor(ranks)).item() == pytest.approx(expected, rel=1e-6)


def test_candidates_of_equal_rank_are_not_compared():
    scores = torch.tensor([1.0, 0.0, 3.0], requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([1, 2, 1]))
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert plackett_luce_loss(scores, torch.tensor([1, 1, 1])).item() == 0.0


def test_centering_penalty_of_a_pair_is_the_square_of_its_sum():
    assert centering_penalty(torch.tensor([2.0, -0.5])).item() == pytest.approx(1.5**2)


def test_outcome_by_hand_and_gradient_sign():
    scores = torch.tensor([math.log(3), math.log(3)], requires_grad=True)
    losses = outcome_loss(scores, torch.tensor([1, 0]))
    assert losses.tolist() == pytest.approx([-math.log(0.75), math.log(4)])
    losses.sum().backward()
    assert scores.grad.tolist() == pytest.approx([-0.25, 0.75])


def test_large_scores_stay_finite():
    scores = torch.tensor([500.0, -500.0], requires_grad=True)
    total = (
        bradley_terry_loss(scores[1:], scores[:1]).sum()
        + plackett_luce_loss(scores, torch.tensor([2, 1]))
        + outcome_loss(scores, torch.tensor([0, 1])).sum()
    )
    total.backward()
    assert total.isfinite() and scores.grad.isfinite().all()
