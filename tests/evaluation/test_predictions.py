"""Metrics of predicted classes and rewards, by hand and as `test` computes them."""

import json

import pytest

from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.evaluation.predictions import measure_classes, measure_rewards
from lit_alignment.tools.evaluate import main
from tests.helpers import class_data, classifier, labelled, trainer, write_jsonl


def placed(lines):
    return [(f"x.jsonl:{number}", line) for number, line in enumerate(lines, 1)]


def chosen_class(prediction, probabilities, label):
    return {"prediction": prediction, "probabilities": probabilities, "label": label}


def test_classes_by_hand():
    lines = [
        chosen_class("a", {"a": 0.9, "b": 0.1}, "a"),
        chosen_class("a", {"a": 0.6, "b": 0.4}, "b"),
        chosen_class("b", {"a": 0.2, "b": 0.8}, 1),  # a label by its number
        chosen_class("b", {"a": 0.2, "b": 0.8}, None),
    ]
    found = measure_classes(placed(lines))
    assert found.values["accuracy"] == pytest.approx(2 / 3)
    assert found.confusion.tolist() == [[1, 0], [1, 1]] and found.classes == ("a", "b")
    assert found.values["auroc"] == pytest.approx(1.0)  # 0.9 of the one `a` is above both `b`
    assert set(found.counts.values()) == {"3 labels"}


@pytest.mark.parametrize(("label", "classes"), [(True, ("true", "false")), (0.0, ("0", "1")), (2, ("2", "3"))])
def test_label_names_the_class_that_training_reads(label, classes):
    line = chosen_class(classes[0], dict(zip(classes, (0.9, 0.1), strict=True)), label)
    assert measure_classes(placed([line])).values["accuracy"] == 1


def test_several_labels_and_numbers_by_hand():
    many = [
        chosen_class(["a", "b"], {"a": 0.9, "b": 0.7}, ["a"]),
        chosen_class([], {"a": 0.1, "b": 0.2}, []),
    ]
    found = measure_classes(placed(many)).values
    assert found["accuracy"] == 0.75 and found["exact_match"] == 0.5
    numbers = [{"prediction": 1.0, "label": 2}, {"prediction": [3.0], "label": [1.0]}]
    assert measure_classes(placed(numbers)).values["mse"] == pytest.approx((1 + 4) / 2)


def test_rewards_by_hand():
    lines = [
        {"rewards": {"chosen": 2.0, "rejected": 1.0}, "meta": {"subset": "x"}},
        {"rewards": {"chosen": 0.0, "rejected": 3.0}, "meta": {"subset": "y"}},
        {"rewards": {"1": 4.0}, "meta": None},
    ]
    found = measure_rewards(placed(lines))
    assert found.values["accuracy"] == 0.5 and found.values["margin"] == -1
    assert found.values["reward"] == 2 and found.counts["reward"] == "5 responses"
    assert found.values["accuracy of x"] == 1 and found.counts["accuracy of y"] == "1 pairs"


@pytest.mark.parametrize(
    "line, message",
    [
        (chosen_class("a", {"a": 1.0, "b": 0.0}, "c"), "x.jsonl:1: field 'label' is 'c', none of a, b"),
        (chosen_class("a", {"a": 1.0, "b": 0.0}, ["a", "b"]), "has 2 classes"),
        ({"prediction": "x", "label": 3}, "field 'prediction' is 'x', no number"),
    ],
)
def test_what_does_not_fit_is_named(line, message):
    with pytest.raises(RecordError, match=message):
        measure_classes(placed([line]))


def test_evaluate_says_what_test_says(tmp_path, capsys):
    from lit_alignment import PredictionWriter

    module = classifier()
    data = class_data(module, labelled(8), labelled(8))
    run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "out"))], max_steps=2)
    run.fit(module, data)
    expected = run.validate(module, data, verbose=False)[0]
    run.predict(module, data)
    file = str(tmp_path / "out/classes.jsonl")
    main([file, "--json", str(tmp_path / "found.json")])
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert found["accuracy"] == pytest.approx(expected["val/accuracy"])
    assert found["macro_f1"] == pytest.approx(expected["val/macro_f1"], abs=1e-6)
    assert found["calibration_error"] == pytest.approx(expected["val/calibration_error_scaled"], abs=1e-5)
    assert "true \\ predicted" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--model: .* holds classes, and this is of generated answers"):
        main([file, "--model", "x"])


def test_predictions_without_labels_have_no_metrics(tmp_path):
    line = {"id": "1", "messages": [{"role": "user", "content": "q"}], **chosen_class("a", {"a": 1.0, "b": 0.0}, None)}
    with pytest.raises(ConfigError, match="no predictions of records with a label"):
        main([write_jsonl(tmp_path / "x.jsonl", [line])])
