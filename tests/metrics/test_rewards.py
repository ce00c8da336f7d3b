"""Metrics of preferences by hand."""

import math

import pytest
import torch

from lit_alignment.metrics.rewards import SECTIONS, Moments, PairMetrics, section_accuracies


def test_accuracy_scores_and_margin_by_hand():
    metric = PairMetrics()
    metric.update(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0]))
    metric.update(torch.tensor([0.5]), torch.tensor([0.5]))
    found, _ = metric.compute()
    assert float(found["accuracy"]) == 0.5  # right, wrong, and a tie that counts half
    assert float(found["chosen_reward"]) == pytest.approx(3.5 / 3)
    assert float(found["rejected_reward"]) == pytest.approx(4.5 / 3)
    assert float(found["margin"]) == pytest.approx(-1 / 3)


def test_calibration_error_compares_confidence_with_accuracy():
    # four pairs at a probability of 0.9, three of them the right way round
    difference = torch.tensor([1.0, 1.0, 1.0, -1.0]) * math.log(9)
    metric = PairMetrics()
    metric.update(difference, torch.zeros(4))
    assert float(metric.compute()[0]["calibration_error"]) == pytest.approx(0.15)


def test_groups_have_accuracies_of_their_own():
    metric = PairMetrics(["a", "b", "c"])
    metric.update(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0, 0, 2]))
    assert metric.compute()[1] == {"a": (0.5, 2), "c": (0.0, 1)}


def test_moments_do_not_depend_on_batches():
    values = torch.tensor([1.0, 4.0, -2.0, 0.5])
    metric = Moments()
    metric.update(values[:1])
    metric.update(values[1:])
    mean, deviation = metric.compute()
    assert mean == pytest.approx(float(values.mean())) and deviation == pytest.approx(float(values.std(correction=0)))


def test_sections_are_means_over_pairs_and_mathematics_weighs_as_much_as_code():
    found = section_accuracies(
        {
            "alpacaeval-easy": (1.0, 100),
            "mt-bench-easy": (0.5, 25),
            "math-prm": (0.4, 447),
            "hep-go": (1.0, 164),
            "hep-rust": (0.6, 164),
            "mine": (0.0, 9),
        }
    )
    assert found == pytest.approx({"Chat": 112.5 / 125, "Reasoning": (0.4 + 0.8) / 2})


def test_whole_benchmark_has_one_score():
    all_subsets = {name: (0.5, 10) for subsets in SECTIONS.values() for name in subsets}
    assert len(all_subsets) == 23
    assert section_accuracies(all_subsets)["RewardBench"] == pytest.approx(0.5)
