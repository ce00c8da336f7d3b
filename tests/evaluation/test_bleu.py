"""BLEU, with its numbers worked by hand."""

import math

import pytest
from torchmetrics.functional.text import bleu_score

from lit_alignment.evaluation.bleu import bleu


def test_bleu_by_hand():
    """`the cat sat on` against `the cat sat down`: 3 of 4 words, 2 of 3 pairs, same length."""
    words, reference = "the cat sat on".split(), "the cat sat down".split()
    assert bleu(words, [reference], 2) == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    assert bleu("the cat".split(), [reference], 1) == pytest.approx(math.exp(1 - 4 / 2))  # brevity
    assert bleu("a b".split(), ["a c".split()], 2) == pytest.approx(math.sqrt(1 / 2 * 0.1 / 1))  # method 1
    assert bleu(["x"], [["y"]], 2) == 0.0 and bleu([], [["y"]], 2) == 0.0


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_bleu_agrees_with_torchmetrics_where_nothing_is_smoothed(ngram):
    text = "the small cat sat on the old mat today"
    others = ["the small cat sat on the new mat", "a small cat sat on the old mat yesterday evening"]
    expected = float(bleu_score([text], [others], n_gram=ngram))
    assert bleu(text.split(), [other.split() for other in others], ngram) == pytest.approx(expected, abs=1e-6)
