"""Metrics of reward models: how often the better response has the higher score, in all and by part of a benchmark.

P ordered pairs, N scores, G groups
"""

import torch
from torch import Tensor
from torchmetrics import Metric

NUM_BINS = 15

# RewardBench: Lambert et al. 2024 (arXiv:2403.13787), table 1.
SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}


class PairMetrics(Metric):
    """Sums over pairs of a better and a worse response, from which all metrics of preferences are computed.

    Args:
        groups: Names of the groups that pairs belong to; each has an accuracy of its own.
    """

    full_state_update = False
    correct: Tensor
    count: Tensor
    chosen: Tensor
    rejected: Tensor
    bin_correct: Tensor
    bin_confidence: Tensor

    def __init__(self, groups: list[str] | None = None) -> None:
        """Start at zero, in float64."""
        super().__init__()
        self.groups = groups or [""]
        for name in ("correct", "count"):
            self.add_state(name, torch.zeros(len(self.groups), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("chosen", "rejected"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("bin_correct", "bin_confidence"):
            self.add_state(name, torch.zeros(NUM_BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, chosen: Tensor, rejected: Tensor, groups: Tensor | None = None) -> None:
        """Add pairs: scores of the better and of the worse response, [P], and indices of their groups, [P]."""
        chosen, rejected = chosen.detach().double(), rejected.detach().double()
        difference = chosen - rejected
        hits = (difference > 0).double() + 0.5 * (difference == 0).double()  # a constant model is right half the time
        groups = torch.zeros(len(hits), dtype=torch.long, device=hits.device) if groups is None else groups
        self.correct += torch.zeros_like(self.correct).index_add(0, groups, hits)
        self.count += torch.zeros_like(self.count).index_add(0, groups, torch.ones_like(hits))
        self.chosen += chosen.sum()
        self.rejected += rejected.sum()
        confidence = difference.abs().sigmoid()  # of the response that the model prefers, from 1/2 to 1
        bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        self.bin_correct += torch.zeros_like(self.bin_correct).index_add(0, bins, hits)
        self.bin_confidence += torch.zeros_like(self.bin_confidence).index_add(0, bins, confidence)

    def compute(self) -> tuple[dict[str, Tensor], dict[str, tuple[float, int]]]:
        """Metrics of all pairs, and accuracy and number of pairs of each group that has some.

        Metrics are accuracy, mean scores and their distance, and the calibration error of sigmoid(chosen - rejected).
        """
        number = self.count.sum()
        rows = zip(self.groups, self.correct.tolist(), self.count.tolist(), strict=True)
        by_group = {name: (correct / count, int(count)) for name, correct, count in rows if count}
        found = {
            "accuracy": self.correct.sum() / number,
            "chosen_reward": self.chosen / number,
            "rejected_reward": self.rejected / number,
            "margin": (self.chosen - self.rejected) / number,
            "calibration_error": (self.bin_correct - self.bin_confidence).abs().sum() / number,
        }
        return found, by_group


class Moments(Metric):
    """Mean and standard deviation of all scores, over all ranks."""

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        """Start at zero, in float64."""
        super().__init__()
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, scores: Tensor) -> None:
        """Add scores, [N]."""
        scores = scores.detach().double()
        self.count += scores.numel()
        self.total += scores.sum()
        self.squares += scores.square().sum()

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation (of the population)."""
        mean = self.total / self.count
        return float(mean), float((self.squares / self.count - mean**2).clamp_min(0).sqrt())


def section_accuracies(by_subset: dict[str, tuple[float, int]]) -> dict[str, float]:
    """RewardBench's accuracies by section, and `RewardBench`, the mean of its sections if all are there.

    A section's accuracy is a mean over its pairs; in Reasoning the one subset of mathematics weighs as much as all
    subsets of code together, as in the paper.

    Args:
        by_subset: Accuracy and number of pairs by name of the subset.
    """
    found = {}
    for section, subsets in SECTIONS.items():
        weights = {name: float(by_subset[name][1]) for name in subsets if name in by_subset}
        if not weights:
            continue
        code = sum(weight for name, weight in weights.items() if name != "math-prm")
        if "math-prm" in weights and code:
            weights["math-prm"] = code
        total = sum(by_subset[name][0] * weight for name, weight in weights.items())
        found[section] = total / sum(weights.values())
    if len(found) == len(SECTIONS):
        found["RewardBench"] = sum(found.values()) / len(SECTIONS)
    return found
