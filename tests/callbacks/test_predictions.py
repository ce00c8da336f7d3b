"""Prediction files: order, several settings, and resuming after a kill."""

import json

import pytest
from lightning.pytorch import Callback

from lit_alignment import PredictionWriter, SFTDataModule
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.generation.prediction_file import PredictionFile
from lit_alignment.generation.settings import DecodingConfig
from tests.helpers import chats, sft_module, trainer

SETTINGS = {
    "greedy": DecodingConfig(max_new_tokens=4),
    "sampled": DecodingConfig(max_new_tokens=4, temperature=1.0, num_return_sequences=2),
}


class Die(Callback):
    def __init__(self, after):
        self.after = after

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx + 1 == self.after:
            raise Killed


class Killed(Exception):
    pass


def run(folder, die_after=None, generation=SETTINGS, **options):
    module = sft_module(generation=generation)
    asked = []
    original = module.respond
    module.respond = lambda items, decoding: (asked.append(len(items)), original(items, decoding))[1]
    first = [{**record, "meta": {"n": 1}, "label": "L"} for record in chats(7)]
    sources = [SourceConfig(records=first, name="one"), SourceConfig(records=chats(5, seed=2), name="two")]
    data = SFTDataModule(module.tokenizer, predict=sources, batch_size=2)
    callbacks = [PredictionWriter(str(folder / "out"), **options)]
    callbacks += [Die(die_after)] if die_after else []
    try:
        trainer(folder, callbacks=callbacks).predict(module, data, return_predictions=False)
    except Killed:
        pass
    return sum(asked)


def lines(folder, name="greedy"):
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def test_lines_follow_the_order_of_the_records_and_carry_what_they_said(tmp_path):
    run(tmp_path)
    found = lines(tmp_path)
    expected = [("one", f"r{i}") for i in range(7)] + [("two", f"r{i}") for i in range(5)]
    assert [(line["dataset"], line["id"]) for line in found] == expected
    first = found[0]
    assert list(first) == ["id", "dataset", "messages", "answers", "label", "meta"]
    assert first["meta"] == {"n": 1} and first["label"] == "L"
    assert set(first["answers"][0]) == {"id", "content", "finish_reason", "num_tokens"}
    assert found[-1]["label"] == chats(5, seed=2)[-1]["messages"][-1]["content"]
    assert all(len(line["answers"]) == 2 for line in lines(tmp_path, "sampled"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "greedy.jsonl",
        "greedy.settings.json",
        "sampled.jsonl",
        "sampled.settings.json",
    }


def test_killed_run_goes_on_without_asking_twice_or_losing_one(tmp_path):
    run(tmp_path / "whole")
    first = run(tmp_path, die_after=3)
    partial = tmp_path / "out/greedy.jsonl.partial0"
    with partial.open("a") as file:
        file.write('{"id": "r3", "dat')  # the kill fell into a line
    rest = run(tmp_path)
    assert first == 6 * 2 and first + rest == 12 * 2
    assert lines(tmp_path) == lines(tmp_path / "whole")
    assert lines(tmp_path, "sampled") == lines(tmp_path / "whole", "sampled")
    assert run(tmp_path) == 0  # all is answered


def test_answers_of_other_settings_are_not_taken_for_these(tmp_path):
    run(tmp_path)
    other = {"greedy": DecodingConfig(max_new_tokens=5)}
    with pytest.raises(ConfigError, match=r"made with other settings \(max_new_tokens: 4 there, 5 now\)"):
        run(tmp_path, generation=other)
    assert run(tmp_path, generation=other, overwrite=True) == 12


def test_broken_line_in_the_middle_is_named(tmp_path):
    file = PredictionFile(tmp_path / "a.jsonl")
    file.append([{"dataset": "d", "id": "1"}])
    text = file.partial.read_text()
    file.partial.write_text("oops\n" + text)
    with pytest.raises(ValueError, match=r"a.jsonl.partial0:1: not valid JSON"):
        file.answered()


def test_record_that_one_of_the_files_lacks_is_asked_again(tmp_path):
    run(tmp_path)
    whole = {name: lines(tmp_path, name) for name in SETTINGS}
    file = tmp_path / "out/greedy.jsonl"
    kept = [line for line in file.read_text().splitlines(keepends=True) if json.loads(line)["id"] != "r3"]
    file.write_text("".join(kept))
    assert len(kept) == len(whole["greedy"]) - 2  # one of each source
    assert run(tmp_path) == 2 * len(SETTINGS)
    assert {name: lines(tmp_path, name) for name in SETTINGS} == whole
