import math

import pytest
import torch

from lit_alignment.metrics import TokenMean


def test_mean_weighs_every_token_equally_whatever_its_batch():
    """Batches of 1 token with loss 4 and 3 tokens with loss 0: the token mean is 1, the mean of means would be 2."""
    metric = TokenMean()
    metric.update(torch.tensor(4.0), torch.tensor(1))
    metric.update(torch.tensor(0.0), torch.tensor(3))
    assert float(metric.compute()) == 1.0


def test_long_sums_keep_their_precision():
    metric = TokenMean()
    for _ in range(3):
        metric.update(torch.tensor(2.0**24), torch.tensor(2**24))
        metric.update(torch.tensor(1.0), torch.tensor(0))
    assert float(metric.compute()) == pytest.approx(1 + 3 / (3 * 2**24), rel=1e-12)


def test_no_token_gives_nan_and_reset_starts_anew():
    metric = TokenMean()
    assert math.isnan(float(metric.compute()))
    metric.update(torch.tensor(4.0), torch.tensor(1))
    metric.reset()
    metric.update(torch.tensor(1.0), torch.tensor(1))
    assert float(metric.compute()) == 1.0
