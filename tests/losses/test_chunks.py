import warnings

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from lit_alignment.losses import LinearHead, chunks, linear_cross_entropy, linear_divergence, linear_logps_and_entropies


@pytest.mark.parametrize(
    ("free", "vocabulary", "expected"),
    [
        # A sixteenth of the free memory over 16 bytes a logit: 32e9 / (16 * 16 * 128e3) = 976 positions.
        (32e9, 128_000, 512),
        (140e9, 128_000, 4096),
        (1e8, 128_000, 256),
        (1e13, 32_000, 16_384),
    ],
)
def test_chunk_is_a_power_of_two_within_free_memory_and_its_bounds(free, vocabulary, expected):
    assert chunks.chunk_within(int(free), vocabulary) == expected


def test_chunk_on_a_cpu_is_what_its_caches_hold():
    assert chunks.default_chunk_size(torch.device("cpu"), 10) == 256


def _values(dtype):
    """Losses of each kind with a trained head, and their gradients."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((37, 16), (50, 16)))
    targets, weights = torch.randint(0, 50, (37,)), torch.rand(37)
    loss, hits = linear_cross_entropy(hidden, weight, targets, weights, softcap=5.0, label_smoothing=0.1, chunk_size=16)
    logps, entropies = linear_logps_and_entropies(hidden, weight, targets, softcap=5.0, chunk_size=16)
    teacher = LinearHead(weight.detach().flip(0))
    kl, _ = linear_divergence(hidden, LinearHead(weight), hidden.detach(), teacher, beta=0.5, chunk_size=16)
    (loss + logps.logsumexp(0) + entropies.square().sum() + kl).backward()
    return [*(each.detach() for each in (loss, logps, entropies, kl)), hits, hidden.grad, weight.grad]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_losses_and_gradients_are_those_of_the_plain_ones(dtype, monkeypatch):
    expected = _values(dtype)
    monkeypatch.setattr(chunks, "COMPILED_ON", ("cpu",))
    torch.testing.assert_close(_values(dtype), expected)


def test_without_a_compiler_the_loss_is_the_plain_one_after_one_warning(monkeypatch):
    def refuse(*args):
        raise TorchDynamoException("no compiler here")

    plain = chunks.compiled_on_gpu(torch.square)
    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    monkeypatch.setattr(chunks, "COMPILED_ON", ("cpu",))
    with pytest.warns(UserWarning, match="the loss is not compiled, which costs time alone: no compiler here"):
        assert plain(torch.tensor(3.0)) == 9
    with warnings.catch_warnings(action="error"):
        assert plain(torch.tensor(3.0)) == 9
