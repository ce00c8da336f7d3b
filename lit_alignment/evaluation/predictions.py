"""Metrics of what classifiers and reward models have predicted, from the lines of their prediction files.

N conversations, K classes, P pairs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_alignment.data.labels import class_index
from lit_alignment.errors import RecordError
from lit_alignment.metrics.classification import (
    confusion_matrix,
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)
from lit_alignment.metrics.rewards import Moments, PairMetrics, section_accuracies

Line = dict[str, Any]
RERUN = "Give a file that predict has written."


@dataclass(frozen=True)
class Measured:
    """What the lines of one data set say.

    Args:
        values: Metrics by name.
        counts: What each is over, such as "20 labels".
        classes: Names of the classes, of a classifier of one label.
        confusion: Number of conversations by true class (row) and predicted class, [K, K].
    """

    values: dict[str, float]
    counts: dict[str, str]
    classes: tuple[str, ...] = ()
    confusion: Tensor | None = None


def measure_classes(lines: Sequence[tuple[str, Line]]) -> Measured:
    """Metrics of predicted classes or numbers; lines without a label do not count.

    `calibration_error` is of the probabilities as they stand there, at the temperature of predict.

    Args:
        lines: Each with where it stands.

    Raises:
        RecordError: If a line is none of a classifier, or its label is none of its classes.
    """
    judged = [(where, line) for where, line in lines if line.get("label") is not None]
    if not judged:
        return Measured({}, {})
    counts = f"{len(judged)} labels"
    where, first = judged[0]
    if "probabilities" not in first:
        predicted = torch.tensor([_numbers(line, "prediction", where) for where, line in judged])
        targets = torch.tensor([_numbers(line, "label", where) for where, line in judged])
        return _measured(regression_metrics(predicted, targets), counts)
    classes = tuple(first["probabilities"])
    odds = torch.tensor([_probabilities(line, classes, where) for where, line in judged], dtype=torch.float64)
    if isinstance(first["prediction"], list):
        logits = odds.logit()
        targets = torch.zeros_like(logits)
        for row, (where, line) in enumerate(judged):
            targets[row, _indices(line, classes, where)] = 1
        return _measured(multi_label_metrics(logits, targets.float()), counts)
    targets = torch.tensor([_one(_indices(line, classes, where), where) for where, line in judged])
    logits = odds.log()
    found = _measured(single_label_metrics(logits, targets), counts)
    return Measured(found.values, found.counts, classes, confusion_matrix(logits, targets))


def measure_rewards(lines: Sequence[tuple[str, Line]]) -> Measured:
    """Metrics of rewards: of all responses, and of pairs how often the chosen one has the higher one.

    Accuracies stand by `meta.subset` too, and by RewardBench's sections where these are its subsets.

    Args:
        lines: Each with where it stands.

    Raises:
        RecordError: If a line is none of a reward model.
    """
    moments, pairs, subsets = Moments(), [], dict[str, int]()
    for where, line in lines:
        rewards = line.get("rewards")
        if not isinstance(rewards, dict) or not all(isinstance(each, int | float) for each in rewards.values()):
            raise RecordError(where, "rewards", "holds no rewards by the responses' ids", RERUN)
        moments.update(torch.tensor(list(rewards.values()), dtype=torch.float64))
        if rewards.keys() == {"chosen", "rejected"}:
            meta = line.get("meta")
            subset = str(meta.get("subset", "")) if isinstance(meta, dict) else ""
            pairs.append((rewards["chosen"], rewards["rejected"], subsets.setdefault(subset, len(subsets))))
    values, number = {}, int(moments.count)
    values["reward"], values["reward_std"] = moments.compute()
    counts = dict.fromkeys(values, f"{number} responses")
    if pairs:
        metric = PairMetrics(list(subsets))
        chosen, rejected, groups = zip(*pairs, strict=True)
        better, worse = (torch.tensor(side, dtype=torch.float64) for side in (chosen, rejected))
        metric.update(better, worse, torch.tensor(groups))
        found, by_subset = metric.compute()
        values |= {name: float(value) for name, value in found.items()}
        counts |= dict.fromkeys(found, f"{len(pairs)} pairs")
        named = {name: each for name, each in by_subset.items() if name}
        values |= {f"accuracy of {name}": accuracy for name, (accuracy, _) in named.items()}
        counts |= {f"accuracy of {name}": f"{size} pairs" for name, (_, size) in named.items()}
        sections = section_accuracies(named)
        values |= sections
        counts |= dict.fromkeys(sections, "RewardBench")
    return Measured(values, counts)


def _measured(found: dict[str, Tensor], over: str) -> Measured:
    values = {name: float(value) for name, value in found.items() if bool(value.isfinite())}
    return Measured(values, dict.fromkeys(values, over))


def _numbers(line: Line, field: str, where: str) -> list[float]:
    given = line.get(field)
    values = given if isinstance(given, list) else [given]
    numbers = [float(each) for each in values if isinstance(each, int | float)]
    if len(numbers) < len(values):
        raise RecordError(where, field, f"is {given!r}, no number", RERUN)
    return numbers


def _probabilities(line: Line, classes: tuple[str, ...], where: str) -> list[float]:
    given = line.get("probabilities")
    if not isinstance(given, dict) or tuple(given) != classes:
        raise RecordError(where, "probabilities", f"has other classes than {', '.join(classes)}", RERUN)
    return [float(given[name]) for name in classes]


def _indices(line: Line, classes: tuple[str, ...], where: str) -> list[int]:
    """A label, a name or number or a list of these, as positions of the classes."""
    given = line["label"] if isinstance(line["label"], list) else [line["label"]]
    found = [class_index(each, classes) for each in given]
    if None in found:
        problem = f"is {given[found.index(None)]!r}, none of {', '.join(classes)}"
        raise RecordError(where, "label", problem, "Correct the record's label.")
    return [index for index in found if index is not None]


def _one(indices: list[int], where: str) -> int:
    if len(indices) != 1:
        raise RecordError(
            where, "label", f"has {len(indices)} classes", "This classifier gives one. Correct the label."
        )
    return indices[0]
