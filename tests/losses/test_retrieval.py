"""Retrieval objectives against numbers worked by hand and against a slow loop over passages."""

import math

import pytest
import torch

from lit_alignment.losses import (
    emdr2_loss,
    info_nce_loss,
    leave_one_out_loss,
    perplexity_distillation_loss,
    rag_sequence_loss,
    rag_token_loss,
    replug_loss,
)

B, K, T = 3, 4, 5
DISTILLATION = [perplexity_distillation_loss, leave_one_out_loss, replug_loss]


def softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def random_case():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, K, generator=generator)
    token_logps = -torch.rand(B, K, T, generator=generator) * 3
    weights = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0.5, 2, 0, 0]])
    return scores, token_logps, weights


def test_rag_sequence_by_hand():
    # p(z) = (3/4, 1/4), p(y|z) = (1/2, 1/10): p(y) = 3/8 + 1/40 = 0.4
    scores = torch.tensor([[math.log(3), 0.0]])
    logps = torch.tensor([[math.log(0.5), math.log(0.1)]])
    assert rag_sequence_loss(scores, logps).item() == pytest.approx(-math.log(0.4))


def test_rag_token_by_hand():
    # p(z) = (1/2, 1/2); token 1: (0.8 + 0.4) / 2 = 0.6, token 2: (0.1 + 0.3) / 2 = 0.2
    token_logps = torch.tensor([[[0.8, 0.1], [0.4, 0.3]]]).log()
    found = rag_token_loss(torch.zeros(1, 2), token_logps, torch.ones(1, 2))
    assert found.item() == pytest.approx(-math.log(0.6) - math.log(0.2))


def test_marginal_likelihoods_equal_a_loop_over_passages():
    scores, token_logps, weights = random_case()
    sequence = rag_sequence_loss(scores, (token_logps * weights[:, None]).sum(-1))
    token = rag_token_loss(scores, token_logps, weights)
    for b in range(B):
        prior = softmax(scores[b].tolist())
        whole = sum(
            prior[k] * math.exp(sum(float(token_logps[b, k, t] * weights[b, t]) for t in range(T))) for k in range(K)
        )
        assert sequence[b].item() == pytest.approx(-math.log(whole), rel=1e-5)
        by_token = [
            float(weights[b, t]) * math.log(sum(prior[k] * math.exp(token_logps[b, k, t]) for k in range(K)))
            for t in range(T)
        ]
        assert token[b].item() == pytest.approx(-sum(by_token), rel=1e-5)


def test_one_token_has_the_same_likelihood_in_both_forms():
    scores, token_logps, _ = random_case()
    both = (
        rag_token_loss(scores, token_logps[..., :1], torch.ones(B, 1)),
        rag_sequence_loss(scores, token_logps[..., 0]),
    )
    torch.testing.assert_close(*both)


def test_emdr2_pulls_the_prior_to_the_posterior_and_leaves_the_generator_alone():
    scores, token_logps, _ = random_case()
    scores.requires_grad_()
    logps = token_logps.sum(-1).requires_grad_()
    loss = emdr2_loss(scores, logps)
    torch.testing.assert_close(loss, rag_sequence_loss(scores, logps))
    loss.sum().backward()
    assert logps.grad is None
    prior, posterior = scores.softmax(-1), (scores.log_softmax(-1) + logps).softmax(-1)
    torch.testing.assert_close(scores.grad, prior - posterior)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_distillation_equals_a_loop_over_passages(temperature):
    scores, token_logps, _ = random_case()
    logps = token_logps.mean(-1)
    found = {loss: loss(scores, logps, temperature) for loss in DISTILLATION}
    for b in range(B):
        prior, values = softmax(scores[b].tolist()), logps[b].tolist()
        for loss, target in {
            perplexity_distillation_loss: softmax([v / temperature for v in values]),
            leave_one_out_loss: softmax([-v / temperature for v in values]),
        }.items():
            expected = sum(q * math.log(q / p) for q, p in zip(target, prior, strict=True))
            assert found[loss][b].item() == pytest.approx(expected, rel=1e-4)
        target = softmax([math.exp(v) / temperature for v in values])
        expected = sum(p * math.log(p / q) for q, p in zip(target, prior, strict=True))
        assert found[replug_loss][b].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", DISTILLATION)
def test_distillation_trains_the_retriever_only(loss):
    scores, logps = torch.zeros(1, 2, requires_grad=True), torch.tensor([[-0.2, -2.0]], requires_grad=True)
    loss(scores, logps).sum().backward()
    assert logps.grad is None
    better = 1 if loss is leave_one_out_loss else 0  # left out, the second passage costs more
    assert scores.grad[0, better] < 0 < scores.grad[0, 1 - better]


def test_distillation_is_nothing_where_the_retriever_agrees():
    logps = torch.tensor([[-1.0, -2.0, -3.0]])
    assert perplexity_distillation_loss(logps, logps).item() == pytest.approx(0, abs=1e-6)
    assert leave_one_out_loss(-logps, logps).item() == pytest.approx(0, abs=1e-6)
    assert replug_loss(logps.exp() / 0.1, logps).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [rag_sequence_loss, emdr2_loss, *DISTILLATION])
def test_one_passage_gives_a_retriever_no_gradient(loss):
    scores = torch.tensor([[0.7]], requires_grad=True)
    loss(scores, torch.tensor([[-1.3]])).sum().backward()
    assert scores.grad.item() == 0


@pytest.mark.parametrize("loss", [rag_sequence_loss, emdr2_loss, *DISTILLATION])
def test_order_of_passages_does_not_matter(loss):
    scores, token_logps, _ = random_case()
    logps, order = token_logps.sum(-1), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(scores[:, order], logps[:, order]), loss(scores, logps))


def test_info_nce_by_hand():
    # own passage e^1 among e^1, e^0, e^0
    scores = torch.tensor([[1.0, 0.0, 0.0]])
    expected = -math.log(math.e / (math.e + 2))
    assert info_nce_loss(scores, torch.tensor([0])).item() == pytest.approx(expected)


def test_copy_of_the_own_passage_is_no_negative():
    scores = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    excluded = torch.tensor([[True, True, False]])
    loss = info_nce_loss(scores, torch.tensor([0]), excluded)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1)))
    loss.sum().backward()
    assert scores.grad[0, 1] == 0


def test_shapes_that_do_not_fit_are_refused():
    for loss in (rag_sequence_loss, *DISTILLATION):
        with pytest.raises(ValueError, match=r"must be \[B, K\]"):
            loss(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"\[B, K, T\]"):
        rag_token_loss(torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 5))
