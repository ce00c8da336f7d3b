import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_alignment.losses import linear_cross_entropy, linear_logps, token_cross_entropy


def test_loss_of_two_tokens_worked_by_hand():
    """Logits (1, 0) for target 0 and (0, 2) for target 0.

    -log p: log(1 + e^-1) = 0.31326 and log(1 + e^2) = 2.12693; their sum is 2.44019, with weights 1 and 0.5 it is
    1.37673. The first target is the argmax, the second is not.
    """
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weight, targets = torch.eye(2), torch.tensor([0, 0])
    loss, hits = linear_cross_entropy(hidden, weight, targets)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(2)), rel=1e-6)
    assert int(hits) == 1
    loss, _ = linear_cross_entropy(hidden, weight, targets, torch.tensor([1.0, 0.5]))
    assert float(loss) == pytest.approx(0.31326 + 0.5 * 2.12693, rel=1e-4)


def test_label_smoothing_worked_by_hand():
    """Logits (1, 0), target 0, smoothing 0.2: 0.9 * 0.31326 + 0.1 * 1.31326 = 0.41326."""
    loss, _ = linear_cross_entropy(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([0]), label_smoothing=0.2)
    assert float(loss) == pytest.approx(0.41326, rel=1e-4)


def _inputs(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(50, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, 50, (37,)), torch.rand(37)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 5.0), (0.5, 3.0)])
def test_chunked_loss_and_gradients_equal_full_logits(smoothing, scale, softcap):
    hidden, weight, bias, targets, weights = _inputs(torch.float32)
    found, found_hits = linear_cross_entropy(
        hidden,
        weight,
        targets,
        weights,
        bias=bias,
        label_smoothing=smoothing,
        scale=scale,
        softcap=softcap,
        chunk_size=8,
    )
    logits = scale * (hidden @ weight.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected, expected_hits = token_cross_entropy(logits, targets, weights, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert int(found_hits) == int(expected_hits)
    # A factor on the loss must reach the gradients, which were made before it was known.
    inputs = (hidden, weight, bias)
    for one, other in zip(
        torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_chunk_size_does_not_change_the_loss():
    hidden, weight, _, targets, weights = _inputs(torch.float32)
    losses = [float(linear_cross_entropy(hidden, weight, targets, weights, chunk_size=n)[0]) for n in (1, 5, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_gradient_step_lowers_the_loss():
    hidden, weight, _, targets, _ = _inputs(torch.float32)
    before, _ = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(before, hidden)
    after, _ = linear_cross_entropy(hidden - 0.01 * gradient, weight, targets)
    assert float(after) < float(before)


def test_no_trained_position_gives_zero_loss_and_zero_gradient():
    weight = torch.randn(50, 16, requires_grad=True)
    hidden = torch.randn(0, 16, requires_grad=True)
    loss, hits = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss) == 0 and int(hits) == 0 and float(weight.grad.abs().sum()) == 0


def test_bfloat16_loss_is_computed_in_float32():
    hidden, weight, _, targets, _ = _inputs(torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    expected, _ = token_cross_entropy((hidden @ weight.T), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0.0)


def test_wrong_number_of_targets_is_refused():
    with pytest.raises(ValueError, match="hidden has 3 positions, but targets has shape"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("head", ["trains", "frozen"])
@pytest.mark.parametrize(
    "scale, softcap, temperature", [(1.0, None, 1.0), (0.25, None, 0.7), (1.0, 2.0, 1.0), (0.5, 3.0, 1.6)]
)
def test_chunked_logps_and_gradients_equal_full_logits(scale, softcap, temperature, head):
    """Under a loss that weighs tokens by their own log-probabilities."""
    torch.manual_seed(0)
    shapes = {"hidden": (11, 6), "weight": (17, 6), "bias": (17,)}
    trained = [*shapes] if head == "trains" else ["hidden"]
    ours = {name: torch.randn(shape).requires_grad_(name in trained) for name, shape in shapes.items()}
    theirs = {name: value.detach().clone().requires_grad_() for name, value in ours.items()}
    targets = torch.randint(0, 17, (11,))
    settings = {"scale": scale, "softcap": softcap, "temperature": temperature, "chunk_size": 4}
    found = linear_logps(**ours, targets=targets, **settings)
    with torch.no_grad():
        assert torch.equal(linear_logps(**ours, targets=targets, **settings), found)
    logits = scale * (theirs["hidden"] @ theirs["weight"].T + theirs["bias"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = (logits / temperature).log_softmax(-1)[torch.arange(11), targets]
    torch.testing.assert_close(found, expected)
    for logps in (found, expected):
        logps.view(1, 11).logsumexp(-1).sum().backward()
    for name in trained:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)
    assert all(ours[name].grad is None for name in shapes if name not in trained)
    without_bias = linear_logps(ours["hidden"], ours["weight"], targets, chunk_size=4)
    plain = (ours["hidden"] @ ours["weight"].T).log_softmax(-1)[torch.arange(11), targets]
    torch.testing.assert_close(without_bias, plain)


class Products(TorchDispatchMode):
    """Counts matrix products with a head of 17 entries."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.number += any(isinstance(each, torch.Tensor) and 17 in each.shape for each in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trains", "products"), [(True, 4), (False, 2)])
def test_frozen_head_is_multiplied_twice_a_chunk_and_a_trained_one_four_times(trains, products):
    """For SFT's loss, which knows its weights before, it is three; of which a frozen head takes two."""
    hidden, weight = torch.randn(12, 6, requires_grad=True), torch.randn(17, 6).requires_grad_(trains)
    with Products() as counted:
        linear_logps(hidden, weight, torch.randint(0, 17, (12,)), chunk_size=4).sum().backward()
    assert counted.number == 3 * products


def test_logps_of_no_token_are_none_and_wrong_numbers_are_refused():
    assert linear_logps(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="hidden has 2 positions"):
        linear_logps(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long))


def test_gradients_of_float64_are_summed_in_float64():
    hidden, weight, bias, targets, weights = _inputs(torch.float64)
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights.double(), bias=bias, chunk_size=5)
    loss.backward()
    found = [each.grad.clone() for each in (hidden, weight, bias)]
    for each in (hidden, weight, bias):
        each.grad = None
    logits = hidden @ weight.T + bias
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (losses * weights.double()).sum().backward()
    for gradient, each in zip(found, (hidden, weight, bias), strict=True):
        assert gradient.dtype == torch.float64 and (gradient - each.grad).abs().max() < 1e-13
    assert loss.dtype == torch.float64


def test_gradient_of_a_likely_target_is_not_rounded_away_in_bfloat16():
    """p = 1 / (1 + e^-7) = 0.99909 is 1 in bf16, and 1 - p = 9.1e-4 the gradient that the target's logit needs."""
    hidden = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16)
    weight = torch.eye(2, dtype=torch.bfloat16).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.tensor([0]))[0].backward()
    assert float(weight.grad[0, 0]) == pytest.approx(-7 * 9.111e-4, rel=1e-2)
