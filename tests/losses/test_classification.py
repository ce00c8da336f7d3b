"""Classification losses against numbers worked by hand and against plain formulas."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_alignment.losses import balanced_class_weights, focal_loss, multi_label_loss, regression_loss

LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2
TARGETS = torch.tensor([0, 1])


def test_cross_entropy_by_hand():
    assert focal_loss(LOGITS, TARGETS).tolist() == pytest.approx([-math.log(0.75), math.log(2)])


def test_class_weights_scale_each_example_and_nothing_is_divided_by_them():
    weighted = focal_loss(LOGITS, TARGETS, class_weights=torch.tensor([2.0, 0.5]))
    assert weighted.tolist() == pytest.approx([2 * -math.log(0.75), 0.5 * math.log(2)])


def test_focal_factor_comes_from_the_unweighted_probability():
    alpha = torch.tensor([4.0, 1.0])
    found = focal_loss(LOGITS, TARGETS, gamma=2.0, class_weights=alpha)
    # (1 - 3/4)^2 * 4 * -log(3/4); the faulty form would have (1 - (3/4)^4)^2
    assert found.tolist() == pytest.approx([0.25**2 * 4 * -math.log(0.75), 0.5**2 * math.log(2)])


def test_label_smoothing_is_that_of_torch():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 4), torch.randint(0, 4, (5,))
    expected = cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(focal_loss(logits, targets, label_smoothing=0.1), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_pulls_the_true_class_up_and_is_finite_for_a_sure_model(gamma):
    logits = torch.tensor([[2.0, 1.0, -1.0], [200.0, 0.0, 0.0], [-200.0, 0.0, 0.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0, 0]), gamma).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] < 0 and logits.grad[2, 0] < 0


def test_multi_label_by_hand_with_weights_and_smoothing():
    logits = torch.tensor([[0.0, math.log(3)]])
    targets = torch.tensor([[1.0, 0.0]])
    assert multi_label_loss(logits, targets).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    weighted = multi_label_loss(logits, targets, torch.tensor([2.0, 1.0]))
    assert weighted.item() == pytest.approx((2 * math.log(2) + math.log(4)) / 2)
    smooth = multi_label_loss(logits, targets, label_smoothing=0.2)
    second = 0.1 * -math.log(0.75) + 0.9 * math.log(4)
    assert smooth.item() == pytest.approx((math.log(2) + second) / 2)


def test_regression_is_the_squared_error():
    found = regression_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]))
    assert found.tolist() == [2.5]


def test_balanced_weights_give_each_class_the_same_part():
    counts = torch.tensor([6, 2, 0])
    weights = balanced_class_weights(counts)
    assert weights.tolist() == pytest.approx([8 / 12, 2.0, 1.0])
    assert (weights * counts)[:2].tolist() == pytest.approx([4.0, 4.0])


def test_balanced_weights_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    labels = [0] * 5 + [1] * 3 + [2]
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_class_weights(torch.tensor([5, 3, 1])).tolist() == pytest.approx(expected.tolist())


def test_order_of_examples_does_not_matter():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 3), torch.randint(0, 3, (6,))
    order = torch.randperm(6)
    torch.testing.assert_close(focal_loss(logits, targets, 2.0)[order], focal_loss(logits[order], targets[order], 2.0))
