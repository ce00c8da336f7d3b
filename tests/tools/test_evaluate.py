"""Metrics of a predictions file, as a user asks for them."""

import json

import pytest

from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.tools.evaluate import main
from tests.helpers import chats, sft_data, sft_module, trainer, write_jsonl
from tests.helpers.commands import command

ASK = [{"role": "user", "content": "the kitchen scale"}]
ASKED = '{"id": "a", "messages": [{"role": "user", "content": "q"}]'


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
    assert "no value: exact_match, self_bleu, rouge" in " ".join(out.split())  # no reference, one answer


def test_model_metrics_of_what_predict_wrote(tmp_path, capsys):
    """Perplexity under the model that answered, from its own files."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lit_alignment import Export, PredictionWriter
    from lit_alignment.generation.settings import DecodingConfig

    module = sft_module(generation={"greedy": DecodingConfig(max_new_tokens=5, logprobs=True)})
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


def test_checkpoint_brings_the_template_that_it_was_trained_with(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    module = sft_module()
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, sft_data(module, chats(2), encoding=EncodingConfig(template=TemplateConfig(file=str(template)))))
    run.save_checkpoint(tmp_path / "x.ckpt")
    asked = [write_jsonl(tmp_path / "a.jsonl", [line(0, ["reply order"])]), "--model", str(tmp_path / "x.ckpt")]
    found = []
    for extra in ([], ["--template", str(template)]):
        main([*asked, "--metrics", "perplexity", "--json", str(tmp_path / "out.json"), *extra])
        found.append(json.loads((tmp_path / "out.json").read_text())["mine"]["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_same_prompt_twice_and_missing_file_are_refused(file, tmp_path):
    sampled = write_jsonl(tmp_path / "sampled.jsonl", [line(9, ["x"]), line(0, ["x"])])
    with pytest.raises(
        RecordError, match=r"sampled.jsonl:2: field 'id' 'r0' of 'mine' was answered at .*greedy.jsonl:1"
    ):
        main([file, sampled])
    with pytest.raises(FileNotFoundError, match="no such file"):
        main([str(tmp_path / "missing.jsonl")])
    with pytest.raises(FileNotFoundError, match="no such file"):
        main([str(tmp_path)])


def test_several_files_and_spaces_between_names(file, tmp_path):
    more = write_jsonl(tmp_path / "more.jsonl", [line(3, ["q"])])
    main([file, more, "--metrics", "exact_match, length", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["mine"]["exact_match"] == pytest.approx((0.5 + 1 + 0) / 3) and "length_words" in found["mine"]


def test_unknown_metric_and_missing_model_are_refused(file):
    with pytest.raises(ConfigError, match="Did you mean 'perplexity'"):
        main([file, "--metrics", "perplexty"])
    with pytest.raises(ConfigError, match="need a model: give --model"):
        main([file, "--metrics", "perplexity"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r":2: not valid JSON"),
        ("[]", r":2: the record is a list, not an object"),
        ('{"id": "a", "messages": [], "answers": []}', r":2: field 'messages' is empty"),
        ('{"id": "a", "messages": [{"role": "user"}]}', r":2: field 'messages\[0\].content' is missing"),
        (ASKED + "}", r":2: field 'answers' is missing"),
        (ASKED + ', "answers": []}', r":2: field 'answers' is empty"),
        (ASKED + ', "answers": [{"content": 3}]}', r":2: field 'answers' holds one without a text"),
        (ASKED + ', "answers": [{"content": "", "num_tokens": "3"}]}', r":2: field 'answers' holds one whose 'num_tok"),
        (ASKED + ', "answers": [{"content": ""}], "dataset": null}', r":2: field 'dataset' is missing or wrong"),
        (ASKED + ', "answers": [{"content": ""}], "meta": {"documents": "x"}}', r":2: field 'documents' is a string"),
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
