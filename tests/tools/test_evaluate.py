"""Metrics of a predictions file, as a user asks for them."""

import json

import pytest

from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.tools.evaluate import main
from tests.helpers import chats, command, sft_data, sft_module, trainer, write_jsonl

ASK = [{"role": "user", "content": "the kitchen scale"}]


def line(number, answers, label="a b", **rest):
    answers = [{"id": str(i), "content": text, "finish_reason": "stop"} for i, text in enumerate(answers)]
    return {"id": f"r{number}", "dataset": "mine", "messages": ASK, "answers": answers, "label": label, **rest}


@pytest.fixture
def file(tmp_path):
    lines = [line(0, ["a b", "a c"]), line(1, ["a b"]), line(2, ["x y z"], None, dataset="other")]
    return write_jsonl(tmp_path / "greedy.jsonl", lines)


def test_text_metrics_of_each_data_set(file, tmp_path, capsys):
    main([file, "--json", str(tmp_path / "out.json"), "--per-record", str(tmp_path / "rows.jsonl")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["mine"]["exact_match"] == 0.75 and found["mine"]["length_words"] == 2
    assert "exact_match" not in found["other"] and found["other"]["distinct_1"] == 1
    rows = [json.loads(row) for row in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["r0", "r1", "r2"] and rows[0]["exact_match"] == 0.5
    out = capsys.readouterr().out
    assert "mine, 2 prompts" in out and "other, 1 prompts" in out and "exact_match" in out


def test_model_metrics_of_what_predict_wrote(tmp_path, capsys):
    """Perplexity under the model that answered, from its own files."""
    from lit_alignment import PredictionWriter
    from lit_alignment.generation.settings import GenerationSettings
    from tests.callbacks.test_export import Export, ModelCheckpoint

    module = sft_module(generation={"greedy": GenerationSettings(max_new_tokens=5, logprobs=True)})
    saver = ModelCheckpoint(tmp_path / "ckpt")
    writer = PredictionWriter(str(tmp_path / "out"))
    run = trainer(tmp_path, callbacks=[saver, Export(), writer], enable_checkpointing=True)
    data = sft_data(module, chats(6), chats(3))
    run.fit(module, data)
    run.predict(module, data)
    file, model = str(tmp_path / "out/greedy.jsonl"), str(tmp_path / "ckpt/export")
    main([file, "--metrics", "perplexity", "--model", model, "--json", str(tmp_path / "out.json")])
    lines = [json.loads(text) for text in (tmp_path / "out/greedy.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "out.json").read_text())["val"]["perplexity"] > 1
    assert "tokens" in capsys.readouterr().out and len(lines) == 3


def test_unknown_metric_and_missing_model_are_refused(file):
    with pytest.raises(ConfigError, match="Did you mean 'perplexity'"):
        main([file, "--metrics", "perplexty"])
    with pytest.raises(ConfigError, match="need a model: give --model"):
        main([file, "--metrics", "perplexity"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r":2: not valid JSON"),
        ("[]", r":2: is no object"),
        ('{"id": "a", "messages": []}', r":2: field 'answers' is missing"),
        ('{"id": "a", "messages": [], "answers": []}', r":2: field 'answers' is empty"),
        ('{"id": "a", "messages": [], "answers": [{"content": 3}]}', r":2: field 'answers' holds one without a text"),
    ],
)
def test_broken_line_is_named(text, message, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(line(0, ["a"])) + "\n" + text + "\n")
    with pytest.raises(RecordError, match=message):
        main([str(path)])


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no predictions"):
        main([str(tmp_path / "empty.jsonl")])


@pytest.mark.slow
def test_command_line_prints_a_table(file):
    result = command("evaluate", file, "--metrics", "exact_match,length")
    assert result.returncode == 0 and "exact_match" in result.stdout and "0.75" in result.stdout
    assert result.stderr == ""
