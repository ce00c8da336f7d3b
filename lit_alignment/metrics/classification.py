"""Metrics of classifiers over a whole data set, and the temperature that calibrates their probabilities.

N examples, K labels
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import (
    mean_absolute_error,
    mean_squared_error,
    pearson_corrcoef,
    r2_score,
    spearman_corrcoef,
)
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_f1_score,
    binary_precision,
    binary_recall,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)
from torchmetrics.utilities import dim_zero_cat

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017
# What the examples must have for metrics to be defined; without it they are NaN, whatever the scores.
NEEDS = {
    "auroc": "records of two classes or more",
    "average_precision": "records that have a label",
    "weighted_f1": "records that have a label",
    "r2": "records with different numbers",
    "pearson": "records with different numbers",
    "spearman": "records with different numbers",
}


class ScoresAndTargets(Metric):
    """All scores and targets of a data set, on all ranks, for metrics that no sum of batches gives.

    Args:
        width: Scores of an example, K.
    """

    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, width: int) -> None:
        """Start empty."""
        super().__init__()
        self.width = width
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch: scores, [N, K], and targets, [N] or [N, K]. N may be 0, for a rank without an example."""
        self.scores.append(scores.detach().float())
        self.targets.append(targets.detach())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Scores, [N, K], and targets, on every rank, in no order."""
        if len(self.scores) == 0:  # a list on one process, one tensor where ranks were gathered
            return torch.zeros(0, self.width), torch.zeros(0)
        return dim_zero_cat(self.scores), dim_zero_cat(self.targets)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """What `compute` gives, in its own shape: torchmetrics makes scalars of tensors with one element."""
        scores, targets = self.compute()
        shape = (-1, self.width) if targets.is_floating_point() else (-1,)
        return scores.reshape(-1, self.width), targets.reshape(shape)


def single_label_metrics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Metrics of a classifier with one class an example.

    Means over classes leave out those that do not occur. The area under the ROC curve and the average precision are
    of each class against the rest; the former is NaN where all examples have the same class, as scikit-learn's.

    Args:
        logits: [N, K].
        targets: Indices of the true classes, [N].
    """
    num_classes = logits.shape[1]
    probabilities, predicted = logits.softmax(-1), logits.argmax(-1)
    support = torch.bincount(targets, minlength=num_classes)
    present = support > 0
    split = present & (support < len(targets))  # a class that all examples have has no ROC curve
    recall = multiclass_recall(predicted, targets, num_classes, average="none")
    ranked = [ranks(odds) for odds in log_odds(logits).unbind(1)]
    aurocs = [binary_auroc(ranked[k], (targets == k).long()) for k in split.nonzero()[:, 0].tolist()]
    precisions = [binary_average_precision(ranked[k], (targets == k).long()) for k in present.nonzero()[:, 0].tolist()]
    return {
        "accuracy": (predicted == targets).float().mean(),
        "balanced_accuracy": recall[present].mean(),
        "macro_f1": multiclass_f1_score(predicted, targets, num_classes, average="macro"),
        "weighted_f1": multiclass_f1_score(predicted, targets, num_classes, average="weighted"),
        "precision": multiclass_precision(predicted, targets, num_classes, average="macro"),
        "recall": multiclass_recall(predicted, targets, num_classes, average="macro"),
        "auroc": logits.new_tensor(aurocs).mean(),
        "average_precision": logits.new_tensor(precisions).mean(),
        "calibration_error": multiclass_calibration_error(probabilities, targets, num_classes, NUM_BINS),
    }


def ranks(scores: Tensor) -> Tensor:
    """The order of scores as numbers below 1, equal ones alike, [N]: probabilities near 1 would be rounded together."""
    order: Tensor = torch.unique(scores, return_inverse=True)[1]
    return order.double() / max(1, len(scores))


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds of each class against all others, [N, K], exact where its probability is rounded to 1."""
    logits = logits.double()
    total = logits.logsumexp(-1, keepdim=True)
    others = total + torch.log1p(-(logits - total).exp().clamp(max=0.5))
    best = logits.argmax(-1, keepdim=True)  # of the likeliest class, what the others sum to is too small a difference
    rest = logits.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
    return logits - others.scatter(-1, best, rest)


def binary_metrics(scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Metrics of yes-or-no decisions; yes is predicted from probability 1/2 on.

    The area under the ROC curve is NaN without a yes and a no, the average precision without a yes.

    Args:
        scores: Logits of yes, [N].
        targets: 1 for yes, [N].
    """
    targets, probabilities, ranked = targets.long(), scores.sigmoid(), ranks(scores)
    predicted, positives, undefined = (scores > 0).long(), int(targets.sum()), scores.new_tensor(math.nan)
    return {
        "accuracy": (predicted == targets).float().mean(),
        "f1": binary_f1_score(predicted, targets),
        "precision": binary_precision(predicted, targets),
        "recall": binary_recall(predicted, targets),
        "auroc": binary_auroc(ranked, targets) if 0 < positives < len(targets) else undefined,
        "average_precision": binary_average_precision(ranked, targets) if positives else undefined,
        "calibration_error": binary_calibration_error(probabilities, targets, NUM_BINS),
    }


def multi_label_metrics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Metrics of a classifier with any number of labels an example; a label is predicted from probability 1/2 on.

    Means over labels leave out, of the area under the ROC curve and the average precision, labels that no example has,
    and are NaN where none is left; so is the F1 that labels are weighted in by their number.

    Args:
        logits: [N, K].
        targets: 1 where a label applies, [N, K].
    """
    positives = targets.sum(0)
    each = [binary_metrics(logits[:, k], targets[:, k]) for k in range(logits.shape[1])]
    by_label = {name: torch.stack([found[name] for found in each]) for name in each[0]}
    split = (positives > 0) & (positives < len(targets))
    together = binary_metrics(logits.flatten(), targets.flatten())
    return {
        "accuracy": together["accuracy"],
        "exact_match": ((logits > 0) == (targets > 0)).all(-1).float().mean(),
        "macro_f1": by_label["f1"].mean(),
        "micro_f1": together["f1"],
        "weighted_f1": (by_label["f1"] * positives).sum() / positives.sum(),
        "precision": by_label["precision"].mean(),
        "recall": by_label["recall"].mean(),
        "auroc": by_label["auroc"][split].mean(),
        "average_precision": by_label["average_precision"][positives > 0].mean(),
        "calibration_error": together["calibration_error"],
    }


def regression_metrics(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Errors and correlations, means over the K quantities.

    R2 and correlations leave out quantities of which all targets are equal, and are NaN where none is left. Equal
    predictions of different targets correlate with these by 0.

    Args:
        predictions: [N, K].
        targets: [N, K].
    """
    found = {
        "mse": mean_squared_error(predictions, targets),
        "mae": mean_absolute_error(predictions, targets),
    }
    differ = targets.amax(0) > targets.amin(0)
    if not differ.any():
        return found | dict.fromkeys(("r2", "pearson", "spearman"), predictions.new_tensor(math.nan))
    predictions, targets = predictions[:, differ], targets[:, differ]
    told = predictions.amax(0) != predictions.amin(0)
    found["r2"] = r2_score(predictions, targets)
    for name, correlation in (("pearson", pearson_corrcoef), ("spearman", spearman_corrcoef)):
        each = correlation(predictions[:, told], targets[:, told]) if told.any() else predictions.new_zeros(1)
        found[name] = each.sum() / len(told)
    return found


def confusion_matrix(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of examples by true class (row) and predicted class (column), [K, K]."""
    return multiclass_confusion_matrix(logits.argmax(-1), targets, logits.shape[1])


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature by which to divide logits so that their probabilities have the lowest cross-entropy.

    The loss is convex in beta = 1/T; its slope is the mean of E_p[z] - z_y (for several labels of (p - y) z), which
    rises with beta, so its zero is found by bisection. Order and accuracy of predictions stay.

    Args:
        logits: [N, K].
        targets: Indices of true classes, [N], or 1 where a label applies, [N, K].

    Returns:
        A number between 1/100 and 100; the ends where the data are separated without error, or no better than chance.

    Source: Guo et al. 2017 (arXiv:1706.04599).
    """
    logits = logits.double()

    def slope(beta: float) -> float:
        if targets.ndim == 2:
            return float((((beta * logits).sigmoid() - targets.double()) * logits).mean())
        expected = ((beta * logits).softmax(-1) * logits).sum(-1)
        return float((expected - logits.gather(-1, targets[:, None]).squeeze(-1)).mean())

    low, high = 1e-2, 1e2  # of beta, in factors
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1.0 / math.sqrt(low * high)
