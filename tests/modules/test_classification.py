"""Classification: what is read, weighed, measured, saved and predicted."""

import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_alignment import ClassificationModule, Export, PredictionWriter, ScoredPicks
from lit_alignment.callbacks.export import export_checkpoint
from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.messages import read_record
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import CheckpointError, ConfigError, RecordError
from lit_alignment.losses import focal_loss
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.modules.scoring import tell_pad_apart
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import (
    LABELS,
    assert_same_gradients,
    base_model_folder,
    class_data,
    classifier,
    labelled,
    step_gradients,
    trainer,
)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_accumulation_equals_one_big_batch(lora, packing, tmp_path):
    path = base_model_folder(tmp_path / "base") if lora else "configs/tiny"
    if packing:  # rows of 64 tokens hold one to many of them
        encoding = EncodingConfig(max_length=64)
        many, windows = {"tokens_per_batch": 64, "encoding": encoding}, 9
        one = {"tokens_per_batch": 4096, "encoding": encoding}
    else:
        many, windows = {"packing": False, "batch_size": 2}, 5
        one = {"packing": False, "batch_size": 9}
    model = classifier(path, lora)
    expected = step_gradients(tmp_path, model, class_data(model, labelled(9), **one))
    model = classifier(path, lora)
    data = class_data(model, labelled(9), **many)
    found = step_gradients(tmp_path, model, data, accumulate_grad_batches=windows)
    assert any("score" in name for name in found)
    assert_same_gradients(found, expected)


def test_gradient_equals_a_slow_loop_over_single_conversations(tmp_path):
    records = labelled(5)
    model = classifier(class_weights=[1.0, 2.0, 0.5], focal_gamma=2.0)
    found = step_gradients(tmp_path, model, class_data(model, records))
    model = classifier()
    network = model.load_model()
    total = torch.zeros(())
    for record in records:
        ids = model.tokenizer.apply_chat_template(record["messages"], return_dict=False)
        logits = network(input_ids=torch.tensor([ids])).logits
        target = torch.tensor([LABELS.index(record["label"])])
        total = total + focal_loss(logits, target, 2.0, torch.tensor([1.0, 2.0, 0.5])).sum()
    (total / len(records)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_does_not_depend_on_batch_padding_or_packing(side):
    records = labelled(8)
    model = classifier()
    model.load_model().eval()
    model.tokenizer.padding_side = side
    scores = {}
    for name, settings in {
        "packed": {"packing": True, "batch_size": 8},
        "padded": {"packing": False, "batch_size": 8},
        "single": {"packing": False, "batch_size": 1},
    }.items():
        loader = class_data(model, val=records, **settings)
        loader.setup("predict")
        with torch.no_grad():
            rows = {}
            for batch in loader.predict_dataloader():
                rows |= zip((item.id for item in batch.items), model.scores(batch.scores), strict=True)
        scores[name] = torch.stack([rows[name] for name in sorted(rows)])
    for name in ("padded", "packed"):
        torch.testing.assert_close(scores[name], scores["single"], rtol=1e-5, atol=1e-5)


def test_score_is_that_of_transformers_however_it_pads(tmp_path):
    records = labelled(6)
    model = classifier()
    network = model.load_model().eval()
    loader = class_data(model, val=records, batch_size=6)
    loader.setup("predict")
    (batch,) = loader.predict_dataloader()
    with torch.no_grad():
        ours = model.scores(batch.scores)
        for side in ("left", "right"):
            texts = [{"input_ids": item.input_ids} for item in batch.items]
            padded = model.tokenizer.pad(texts, padding=True, padding_side=side, return_tensors="pt")
            theirs = network(**padded).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_pad_token_is_never_the_end_of_a_conversation():
    model = classifier()
    assert model.tokenizer.pad_token_id != model.tokenizer.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained("configs/tiny")
    tokenizer.pad_token = tokenizer.eos_token
    tell_pad_apart(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained("configs/tiny"))


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_head_is_saved_with_the_adapters_and_scores_stay(form, tmp_path):
    base = base_model_folder(tmp_path / "base")
    model = classifier(base, lora=True)
    loader = class_data(model, labelled(9), labelled(6, seed=1))
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    runner = trainer(tmp_path, callbacks=[saver], max_epochs=2, enable_checkpointing=True)
    runner.fit(model, loader)
    loader.setup("predict")
    (batch,) = loader.predict_dataloader()
    model.eval()
    with torch.no_grad():
        before = model.scores(batch.scores)
    content = torch.load(tmp_path / "ckpt/x.ckpt", weights_only=True)["state_dict"]
    assert any("score" in name for name in content)
    assert all("lora" in name or "score" in name for name in content)

    network, _ = restore(read_saved(tmp_path / "ckpt/x.ckpt"))
    again = classifier(base, lora=True)
    again.model = network
    with torch.no_grad():
        torch.testing.assert_close(again.scores(batch.scores), before, rtol=1e-5, atol=1e-5)

    folder = export_checkpoint(model, tmp_path / "ckpt/x.ckpt", tmp_path / form, form)
    if form == "merged":
        loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert loaded.config.id2label == dict(enumerate(LABELS))
        assert loaded.config.calibration_temperature == model.temperature
        exported = ClassificationModule(BackboneConfig(str(folder)))
    else:
        exported = ClassificationModule(BackboneConfig(base), adapter=AdapterConfig(str(folder)))
    assert exported.labels == LABELS and exported.temperature == model.temperature
    exported.load_model().eval()
    with torch.no_grad():
        torch.testing.assert_close(exported.scores(batch.scores), before, rtol=1e-5, atol=1e-5)


def test_resume_takes_over_what_was_measured_and_refuses_other_labels(tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    model = classifier()
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(
        model, class_data(model, labelled(9), labelled(6))
    )
    assert model.temperature != 1.0
    again = classifier()
    writer = PredictionWriter(str(tmp_path / "out"))
    loader = class_data(again, val=labelled(6))
    trainer(tmp_path, callbacks=[writer]).predict(again, loader, ckpt_path=tmp_path / "ckpt/x.ckpt")
    assert again.temperature == model.temperature
    other = classifier(labels=["x", "y", "z"])
    with pytest.raises(CheckpointError, match=r"scores \['bad', 'fine', 'good'\] .* this model \['x', 'y', 'z'\]"):
        trainer(tmp_path).validate(other, class_data(other, val=[r | {"label": 0} for r in labelled(6)]),
                                   ckpt_path=tmp_path / "ckpt/x.ckpt")  # fmt: skip


def test_prediction_line_holds_label_prediction_and_probabilities(tmp_path):
    model = classifier()
    records = [*labelled(4), {"id": "bare", "messages": [{"role": "user", "content": "no label"}], "meta": {"a": 1}}]
    writer = PredictionWriter(str(tmp_path))
    trainer(tmp_path, callbacks=[writer]).predict(model, class_data(model, val=records))
    lines = [json.loads(line) for line in (tmp_path / "classes.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "r3", "bare"]
    for line in lines:
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)
        assert sum(line["probabilities"].values()) == pytest.approx(1)
    assert lines[0]["label"] == "bad" and lines[4]["label"] is None and lines[4]["meta"] == {"a": 1}
    assert list(lines[0]) == [
        "id",
        "dataset",
        "messages",
        "prediction",
        "probabilities",
        "label",
        "meta",
        "fingerprint",
    ]


def overfit(folder, problem, labels, values, **settings):
    texts = ["the order is fine", "repair it", "urgent urgent", "billing", "scale the kitchen", "please reply"]
    records = [
        {"id": str(i), "messages": [{"role": "user", "content": text}], "label": value}
        for i, (text, value) in enumerate(zip(texts, values, strict=True))
    ]
    model = classifier(labels=labels, problem=problem, **settings)
    loader = class_data(model, records, records)
    runner = trainer(folder, max_epochs=80)
    runner.fit(model, loader)
    trainer(folder, callbacks=[PredictionWriter(str(folder), overwrite=True)]).predict(model, loader)
    lines = [json.loads(line) for line in (Path(folder) / "classes.jsonl").read_text().splitlines()]
    return runner.callback_metrics, [line["prediction"] for line in lines]


@pytest.mark.slow
def test_every_kind_of_label_can_be_learned(tmp_path):
    single = ["bad", 1, "good", 0, "fine", 2]
    metrics, predictions = overfit(tmp_path, "single_label", LABELS, single, class_weights="balanced")
    assert float(metrics["val/accuracy"]) == float(metrics["val/auroc"]) == float(metrics["val/macro_f1"]) == 1
    assert predictions == ["bad", "fine", "good", "bad", "fine", "good"]
    many = [["bad"], [], [1, "good"], ["bad", "good"], [0, 1, 2], ["fine"]]
    metrics, predictions = overfit(tmp_path, "multi_label", LABELS, many)
    assert float(metrics["val/exact_match"]) == 1
    assert predictions == [["bad"], [], ["fine", "good"], ["bad", "good"], LABELS, ["fine"]]
    numbers = [1.0, -2, 0.5, 3.0, -1.0, 0.0]
    gently = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup=0.1)
    metrics, predictions = overfit(tmp_path, "regression", ["mood"], numbers, optimizer=gently)
    assert float(metrics["val/mae"]) < 0.2 and float(metrics["val/pearson"]) > 0.95
    assert predictions == pytest.approx(numbers, abs=0.6)


def test_validation_loss_is_a_mean_over_conversations_under_any_batching(tmp_path):
    losses = []
    for settings in ({"packing": True}, {"packing": False, "batch_size": 2}, {"packing": False, "batch_size": 7}):
        model = classifier(label_smoothing=0.3)
        (result,) = trainer(tmp_path).validate(model, class_data(model, val=labelled(7), **settings), verbose=False)
        losses.append(result["val/loss"])
    model.eval()
    slow = []
    for record in labelled(7):
        ids = model.tokenizer.apply_chat_template(record["messages"], return_dict=False)
        logits = model.network(input_ids=torch.tensor([ids])).logits
        slow.append(float(cross_entropy(logits, torch.tensor([LABELS.index(record["label"])]))))
    assert losses == pytest.approx([sum(slow) / 7] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("label", "problem", "message"),
    [
        (None, "single_label", r"train\[0\]: field 'label' is missing. Give one of 'bad', 'fine', 'good', or a number"),
        (3, "single_label", r"train\[0\]: field 'label' is 3"),
        ("great", "single_label", "is 'great'"),
        (True, "single_label", "is True"),
        (1.5, "single_label", "is 1.5"),
        ("bad", "multi_label", "Give the list of those that apply"),
        (["bad", "worse"], "multi_label", r"field 'label\[1\]' is 'worse'"),
        (float("nan"), "regression", "Give a finite number, or null"),
        ([1.0], "regression", "Give 3 finite numbers"),
    ],
)
def test_offending_label_is_named_with_its_place(label, problem, message):
    model = classifier(problem=problem)
    loader = class_data(model, [labelled(1)[0] | {"label": label}])
    with pytest.raises(RecordError, match=message):
        loader.setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": None}, "model.labels is missing: configs/tiny is no folder of a classifier"),
        ({"labels": ["a"]}, "give two or more, all different"),
        ({"labels": ["a", "a"]}, "give two or more, all different"),
        ({"class_weights": [1.0]}, "model.class_weights has 1 numbers for 3 labels"),
        ({"problem": "regression", "class_weights": "balanced"}, "are for classes"),
        ({"problem": "multi_label", "focal_gamma": 2.0}, "the focal loss is for problem: single_label"),
        ({"focal_gamma": -1.0}, "model.focal_gamma is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        classifier(**settings)


def test_report_shows_predictions_and_the_confusion_matrix(tmp_path):
    model = classifier()
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    callbacks = [saver, ScoredPicks(num_samples=2), Export()]
    runner = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    runner.fit(model, class_data(model, labelled(9), labelled(6, seed=1)))
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall('title="[a-z]+ taken for', page.partition('aria-label="confusion matrix"')[2])) == 9
    lines = [json.loads(line) for line in (tmp_path / "cherry_picks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 1, 1] and lines[0]["label"] == "bad"
    assert "%" in lines[0]["answer"]
    assert (tmp_path / "ckpt/export/config.json").is_file() and not (
        tmp_path / "ckpt/export/generation_config.json"
    ).exists()


@pytest.mark.parametrize(
    ("problem", "expected"),
    [("single_label", torch.tensor([0.0, 1, 2]).softmax(-1)), ("multi_label", torch.tensor([0.0, 1, 2]).sigmoid())],
)
def test_probabilities_are_those_at_the_calibration_temperature(problem, expected):
    """Scores of 0, 4 and 8 at a temperature of 4."""
    model = classifier(problem=problem)
    model.measure({"calibration_temperature": 4.0})
    item = class_data(model).predict_items([SourceConfig(records=labelled(1))])[0]
    found = model.predicted(item, torch.tensor([[0.0, 4.0, 8.0]]))
    assert found["probabilities"] == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)))


def test_sample_is_right_where_the_predicted_class_is_the_label():
    model = classifier()
    item = class_data(model).predict_items([SourceConfig(records=labelled(1))])[0]
    scores = {"bad": [3.0, 1, 2], "fine": [1.0, 3, 2], "good": [1.0, 2, 3]}
    for name, row in scores.items():
        sample = model.scored_sample(item, model.predicted(item, torch.tensor([row])))
        assert sample.columns["prediction"].startswith(name) and sample.right is (name == item.label == "bad")


@pytest.mark.parametrize(
    ("labels", "given", "named"),
    [(["1", "2", "3"], 1, "1"), (["1", "2", "3"], 3.0, "3"), (["true", "false"], True, "true"), (["a", "b"], 1, "b")],
)
def test_number_or_truth_value_is_shown_as_the_class_that_is_trained(labels, given, named):
    """A star of 1 was shown, and judged, as the class at index 1, and 3 ended the run with an IndexError."""
    model = classifier(labels=labels)
    data = class_data(model)
    record = {**labelled(1)[0], "label": given}
    item = data.predict_items([SourceConfig(records=[record])])[0]
    row = torch.tensor([[9.0 if name == named else 0.0 for name in labels]])
    sample = model.scored_sample(item, model.predicted(item, row))
    assert data.target(read_record(record, "", 0)) == [labels.index(named)] and sample.right is True
    assert sample.scores["probability of the label"] > 0.99


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_validation_on_one_record_is_measured(tmp_path, problem):
    """torchmetrics makes a scalar of a tensor with one element."""
    labels = ["score"] if problem == "regression" else ["a", "b"]
    value = {"single_label": "a", "multi_label": ["a"], "regression": 0.5}[problem]
    records = [{**each, "label": value} for each in labelled(5)]
    model = classifier(labels=labels, problem=problem)
    (result,) = trainer(tmp_path).validate(model, class_data(model, records[1:], records[:1]), verbose=False)
    assert result["val/loss"] > 0


def test_metric_that_the_validation_does_not_define_is_left_out_and_named_once(tmp_path, caplog):
    caplog.set_level("INFO")
    model, logger = classifier(), CSVLogger(tmp_path, "", "")
    alike = [{**each, "label": "fine"} for each in labelled(6, seed=1)]
    runner = trainer(tmp_path, logger=logger, max_epochs=2, num_sanity_val_steps=1)
    runner.fit(model, class_data(model, labelled(6), alike))
    said = [each for each in caplog.messages if "left out" in each]
    assert said == ["val/auroc is left out: it needs records of two classes or more."]
    assert "val/auroc" not in {*model.figures, *runner.callback_metrics} and "val/average_precision" in model.figures
    assert "nan" not in (tmp_path / "metrics.csv").read_text()
