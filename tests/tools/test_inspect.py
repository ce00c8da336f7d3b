"""The view of tokens and labels is what training sees."""

import itertools
import json
import re

import numpy as np
import pytest

from lit_alignment.data.encoding.example import Example
from lit_alignment.errors import ConfigError
from lit_alignment.tools.inspect import collapsed, histogram, main, run_table, shown_tokens
from tests.helpers import (
    chats,
    encoder,
    picture,
    record,
    sft_data,
    sft_module,
    vlm_data,
    vlm_module,
    write_jsonl,
)
from tests.helpers.commands import command

TINY = "configs/sft/tiny.yaml"
ANSWER = {"role": "assistant", "content": "order"}


def test_trained_tokens_are_those_with_a_label(tokenizer):
    example = encoder(tokenizer).encode(record("Hi", "now", "more", "yes"))
    tokens = shown_tokens(example, tokenizer)
    assert [token.index for token in tokens] == example.input_ids
    assert sum(token.trained for token in tokens) == example.num_trained
    assert "".join(token.text for token in tokens if token.trained) == "now<|im_end|>yes<|im_end|>"
    assert {token.text for token in tokens if token.special} == {"<|im_start|>", "<|im_end|>"}


def test_first_token_never_counts_as_trained(tokenizer):
    tokens = shown_tokens(Example([5, 6], [5, 6], [1.0, 0.5]), tokenizer)
    assert [(token.trained, token.weight) for token in tokens] == [(False, 0.0), (True, 0.5)]


def test_runs_of_equal_loss_share_a_line(tokenizer):
    table = run_table(
        shown_tokens(Example([5, 6, 7, 8], [-100, 6, 7, 8], [0, 1.0, 1.0, 0.5]), tokenizer), False, "trained"
    )
    assert list(table.columns[0].cells) == ["0-0", "1-2", "3-3"]
    assert list(table.columns[1].cells) == ["", "trained", "weight 0.5"]


def test_placeholders_of_an_image_are_counted(tmp_path):
    record = {"messages": [{"role": "user", "type": "image", "content": picture(tmp_path / "a.png", 0)}, ANSWER]}
    module = vlm_module()
    data = vlm_data(module, [record], packing=False)
    data.setup("fit")
    tokens = shown_tokens(data.views(data.examples["train"][0])[0][1], module.tokenizer)
    assert [number for token, number in collapsed(tokens) if token.text == "<image>"] == [16]
    assert sum(number for _, number in collapsed(tokens)) == len(tokens)


def test_histogram_counts_every_length_once():
    for lengths in ([7], [3, 3, 3], list(range(1, 100)), [1, 1000]):
        bins = histogram(np.array(lengths))
        assert sum(count for _, _, count in bins) == len(lengths) and len(bins) <= 12
        assert bins[0][0] == min(lengths) and bins[-1][1] >= max(lengths)
        assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(bins))


@pytest.mark.slow
def test_command_shows_tokens_lengths_and_drops(tmp_path):
    broken = [*chats(3), {"id": "empty", "messages": [{"role": "user", "content": "only a question"}]}]
    file = write_jsonl(tmp_path / "mine.jsonl", broken)
    page = tmp_path / "page.html"
    result = command("inspect", "--config", TINY, f"--data.init_args.train=[{{path: {file}}}]", "--html", str(page))
    assert result.returncode == 0, result.stderr
    assert "train 1: mine/r0" in result.stdout and "trained (" in result.stdout and "[<|im_end|>]" in result.stdout
    assert "dropped: 1 no_trained_message" in result.stdout and "packed into" in result.stdout
    assert "max_length 256" in result.stdout and "GPU available" not in result.stderr
    text = page.read_text()
    assert text.count('class="trained') > 5 and "dropped: 1 no_trained_message" in text and "http" not in text


def test_nothing_in_a_record_is_obeyed_by_the_terminal(tmp_path):
    """Not a colour, a title or a direction of writing, and neither are brackets read as rich's own markup."""
    hostile = "\x1b[2J\x1b]0;title\x07[/bold]\u202egnp.exe"
    messages = [{"role": "user", "content": hostile}, {"role": "assistant", "content": "order"}]
    long = {"id": "b", "messages": [{"role": "user", "content": "x " * 500}, messages[1]]}
    file = write_jsonl(tmp_path / "mine.jsonl", [{"id": hostile, "messages": messages}, long])
    for rest in ((), ("--tokens",)):
        result = command("inspect", "--config", TINY, f"--data.init_args.train=[{{path: {file}, name: '[/a]'}}]", *rest)
        assert result.returncode == 0, result.stderr
        shown = result.stdout + result.stderr
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown.replace("\r", ""))
        assert r"[/a]/\x1b[2J\x1b]0;title\x07[/bold]\u202egnp.exe" in shown.replace("\n", "")


def test_single_tokens_show_id_and_label(capsys):
    main(["--config", TINY, "--tokens", "--number", "1"])
    out = capsys.readouterr().out
    rows = re.findall(r"^ *(\d+) +(['\"].*['\"]) +(\d+) +(-?\d+) +(\S+) *$", out, re.M)
    assert len(rows) > 20 and rows[0][3] == "-100"
    trained = [row for row in rows if row[3] != "-100"]
    assert trained and all(row[2] == row[3] and row[4] == "1" for row in trained)


def test_prompts_can_be_inspected(capsys):
    main(["--config", TINY, "--split", "predict", "--number", "1"])
    out = capsys.readouterr().out
    assert "0 trained (0%)" in out and "assistant" in out


def test_first_examples_of_each_source_are_shown(tmp_path, capsys):
    sources = [{"path": write_jsonl(tmp_path / f"{name}.jsonl", chats(3))} for name in ("a", "b")]
    main(["--config", TINY, f"--data.init_args.train={json.dumps(sources)}", "--number", "2"])
    assert re.findall(r"^train (\d): (\S+)", capsys.readouterr().out, re.M) == [
        ("1", "a/r0"),
        ("2", "a/r1"),
        ("3", "b/r0"),
        ("4", "b/r1"),
    ]


def test_missing_configuration_and_empty_split_are_refused():
    with pytest.raises(ConfigError, match="give --config FILE"):
        main([])
    with pytest.raises(ConfigError, match="data.test is empty: nothing to inspect"):
        main(["--config", TINY, "--split", "test", "--data.init_args.test=[]"])


def test_configuration_for_a_gpu_can_be_inspected_without_one(capsys):
    main(["--config", TINY, "--trainer.accelerator=gpu", "--trainer.precision=16-mixed", "--number", "1"])
    assert "train 1:" in capsys.readouterr().out


def test_views_of_a_data_module_default_to_its_one_sequence():
    data = sft_data(sft_module(), chats(2))
    data.setup("fit")
    ((name, example),) = data.views(data.examples["train"][0])
    assert name == "" and example.input_ids == data.examples["train"][0]["input_ids"] and example.num_trained > 0
