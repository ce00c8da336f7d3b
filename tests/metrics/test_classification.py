"""Classification metrics against scikit-learn and numbers worked by hand."""

import math

import pytest
import torch

from lit_alignment.metrics.classification import (
    ScoresAndTargets,
    best_temperature,
    binary_metrics,
    confusion_matrix,
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)

sklearn = pytest.importorskip("sklearn.metrics")


def random_classes(number=200, classes=4, seed=0):
    torch.manual_seed(seed)
    targets = torch.randint(0, classes, (number,))
    logits = torch.randn(number, classes)
    logits[torch.arange(number), targets] += 1.0
    return logits, targets


def test_single_label_metrics_are_those_of_scikit_learn():
    logits, targets = random_classes()
    found = {name: float(value) for name, value in single_label_metrics(logits, targets).items()}
    predicted, probabilities = logits.argmax(-1).numpy(), logits.softmax(-1).numpy()
    y = targets.numpy()
    expected = {
        "accuracy": sklearn.accuracy_score(y, predicted),
        "balanced_accuracy": sklearn.balanced_accuracy_score(y, predicted),
        "macro_f1": sklearn.f1_score(y, predicted, average="macro"),
        "weighted_f1": sklearn.f1_score(y, predicted, average="weighted"),
        "precision": sklearn.precision_score(y, predicted, average="macro"),
        "recall": sklearn.recall_score(y, predicted, average="macro"),
        "auroc": sklearn.roc_auc_score(y, probabilities, multi_class="ovr"),
        "average_precision": sklearn.average_precision_score(torch.eye(4)[targets].numpy(), probabilities),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_class_that_does_not_occur_is_left_out():
    logits, targets = random_classes(classes=3)
    logits = torch.cat([logits, torch.full((len(logits), 1), -9.0)], 1)  # a fourth class, never there
    found, without = single_label_metrics(logits, targets), single_label_metrics(logits[:, :3], targets)
    for name in ("balanced_accuracy", "macro_f1", "auroc", "average_precision"):
        assert float(found[name]) == pytest.approx(float(without[name]), abs=1e-4)


def test_multi_label_metrics_are_those_of_scikit_learn():
    torch.manual_seed(0)
    logits = torch.randn(100, 3)
    targets = ((logits + torch.randn(100, 3)) > 0.5).float()
    found = {name: float(value) for name, value in multi_label_metrics(logits, targets).items()}
    y, predicted, probabilities = targets.numpy(), (logits > 0).numpy(), logits.sigmoid().numpy()
    expected = {
        "accuracy": 1 - sklearn.hamming_loss(y, predicted),
        "exact_match": sklearn.accuracy_score(y, predicted),
        "macro_f1": sklearn.f1_score(y, predicted, average="macro"),
        "micro_f1": sklearn.f1_score(y, predicted, average="micro"),
        "weighted_f1": sklearn.f1_score(y, predicted, average="weighted"),
        "precision": sklearn.precision_score(y, predicted, average="macro"),
        "recall": sklearn.recall_score(y, predicted, average="macro"),
        "auroc": sklearn.roc_auc_score(y, probabilities),
        "average_precision": sklearn.average_precision_score(y, probabilities),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_scores_whose_probabilities_are_rounded_to_one_are_ranked():
    """Sigmoids above 17 are 1 in float32, and ties count as half."""
    scores, targets = torch.tensor([40.0, 30.0, 35.0, 20.0, -50.0, -60.0]), torch.tensor([1, 0, 1, 1, 0, 0])
    found = binary_metrics(scores, targets)
    assert float(found["auroc"]) == pytest.approx(8 / 9)  # of nine pairs one is in the wrong order
    assert float(found["average_precision"]) == pytest.approx((1 + 1 + 3 / 4) / 3)
    logits = torch.stack([torch.zeros(6), scores], dim=1)
    assert float(single_label_metrics(logits, targets)["auroc"]) == pytest.approx(8 / 9)
    wide = torch.cat([logits, torch.full((6, 1), -80.0)], dim=1)
    assert float(single_label_metrics(wide, targets)["auroc"]) == pytest.approx(8 / 9)


def test_one_label_and_yes_or_no_agree():
    logits = torch.tensor([2.0, -1.0, 0.5, -3.0])
    targets = torch.tensor([1, 0, 0, 0])
    one, plain = multi_label_metrics(logits[:, None], targets[:, None]), binary_metrics(logits, targets)
    assert float(one["accuracy"]) == float(plain["accuracy"]) == 0.75
    assert float(plain["auroc"]) == 1.0 and float(plain["precision"]) == 0.5


def test_regression_by_hand():
    found = regression_metrics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [3.0], [5.0]]))
    assert float(found["mse"]) == pytest.approx(2 / 3) and float(found["mae"]) == pytest.approx(2 / 3)
    assert float(found["spearman"]) == pytest.approx(1.0, abs=1e-4) and float(found["r2"]) == pytest.approx(1 - 2 / 8)


def undefined(found):
    return {name for name, value in found.items() if math.isnan(value)}


@pytest.mark.filterwarnings("error")
def test_metric_that_the_examples_do_not_define_is_nan_and_no_other():
    logits, one, none = torch.randn(6, 3), torch.ones(6), torch.zeros(6)
    assert undefined(single_label_metrics(logits, one.long())) == {"auroc"}
    assert undefined(single_label_metrics(logits, torch.tensor([0, 0, 0, 0, 0, 1]))) == set()
    assert undefined(binary_metrics(logits[:, 0], one)) == {"auroc"}
    assert undefined(binary_metrics(logits[:, 0], none)) == {"auroc", "average_precision"}
    assert undefined(multi_label_metrics(logits, torch.stack([one, one, none], 1))) == {"auroc"}
    found = multi_label_metrics(logits, torch.zeros(6, 3))
    assert undefined(found) == {"auroc", "average_precision", "weighted_f1"}
    for number in (1, 6):
        same = regression_metrics(logits[:number, :1], torch.ones(number, 1))
        assert undefined(same) == {"r2", "pearson", "spearman"}


@pytest.mark.filterwarnings("error")
def test_correlations_are_means_over_quantities_whose_targets_differ():
    predictions, targets = torch.tensor([[1.0, 5.0], [2.0, 1.0], [4.0, 7.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    alone = regression_metrics(predictions[:, :1].contiguous(), targets)
    beside = regression_metrics(predictions, torch.cat([targets, torch.ones(3, 1)], 1))
    for name in ("r2", "pearson", "spearman"):
        assert float(beside[name]) == float(alone[name]) > 0.7
    equal = torch.cat([predictions[:, :1], torch.ones(3, 1)], 1)
    halved = regression_metrics(equal, torch.cat([targets, targets], 1))
    assert float(halved["pearson"]) == pytest.approx(float(alone["pearson"]) / 2)
    assert float(halved["spearman"]) == pytest.approx(float(alone["spearman"]) / 2)


def test_confusion_matrix_has_true_classes_in_rows():
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    assert confusion_matrix(logits, torch.tensor([0, 0, 1])).tolist() == [[1, 1], [1, 0]]


def test_calibration_error_by_hand():
    # four predictions of probability 0.9, three of them right: |0.75 - 0.9|
    logits = torch.tensor([[math.log(9), 0.0]] * 4)
    found = single_label_metrics(logits, torch.tensor([0, 0, 0, 1]))
    assert float(found["calibration_error"]) == pytest.approx(0.15, abs=1e-5)


def test_temperature_is_where_the_cross_entropy_is_lowest():
    logits, targets = random_classes()
    best = best_temperature(3 * logits, targets)

    def loss(temperature):
        return float(torch.nn.functional.cross_entropy(3 * logits / temperature, targets))

    assert loss(best) < min(loss(best * 1.02), loss(best / 1.02))
    assert best == pytest.approx(3 * best_temperature(logits, targets), rel=1e-6)
    # four predictions of odds 81, three of them right: a temperature at which the odds are 3
    known = best_temperature(torch.tensor([[math.log(81), 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    assert known == pytest.approx(math.log(81) / math.log(3), rel=1e-6)


def test_temperature_of_several_labels():
    torch.manual_seed(0)
    logits = torch.randn(500, 2) * 2
    targets = (torch.rand(500, 2) < (logits / 2.5).sigmoid()).float()
    assert best_temperature(logits, targets) == pytest.approx(2.5, rel=0.2)


def test_temperature_stays_finite_for_data_without_error():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert 0.01 <= best_temperature(logits, torch.tensor([0, 1])) < 0.2
    assert best_temperature(logits, torch.tensor([1, 0])) == pytest.approx(100, rel=1e-3)


def test_batches_add_up_and_a_rank_without_examples_adds_nothing():
    logits, targets = random_classes(10)
    metric = ScoresAndTargets(4)
    for part in (slice(0, 3), slice(3, 3), slice(3, 10)):
        metric.update(logits[part], targets[part])
    found, labels = metric.compute()
    assert torch.equal(found, logits) and torch.equal(labels, targets)
