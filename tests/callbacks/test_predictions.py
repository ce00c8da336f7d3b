"""Prediction files: order, several settings, and resuming after a kill."""

import json
import resource
import subprocess
import sys

import pytest
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

from lit_alignment import BackboneConfig, PredictionWriter, SFTDataModule, SFTModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from tests.helpers import base_model_folder, chats, sft_data, sft_module, trainer, write_jsonl

USUAL = EncodingConfig()
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


def run(folder, die_after=None, generation=SETTINGS, sources=None, encoding=USUAL, **options):
    module = sft_module(generation=generation)
    asked = []
    original = module.respond
    module.respond = lambda items, decoding: (asked.append(len(items)), original(items, decoding))[1]
    first = [{**record, "meta": {"n": 1}, "label": "L"} for record in chats(7)]
    sources = sources or [SourceConfig(records=first, name="one"), SourceConfig(records=chats(5, seed=2), name="two")]
    data = SFTDataModule(module.tokenizer, predict=sources, batch_size=2, encoding=encoding)
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
    assert list(first) == ["id", "dataset", "messages", "answers", "label", "meta", "fingerprint"]
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


def test_record_that_one_of_the_files_lacks_is_asked_again(tmp_path):
    run(tmp_path)
    whole = {name: lines(tmp_path, name) for name in SETTINGS}
    file = tmp_path / "out/greedy.jsonl"
    kept = [line for line in file.read_text().splitlines(keepends=True) if json.loads(line)["id"] != "r3"]
    file.write_text("".join(kept))
    assert len(kept) == len(whole["greedy"]) - 2  # one of each source
    assert run(tmp_path) == 2 * len(SETTINGS)
    assert {name: lines(tmp_path, name) for name in SETTINGS} == whole


class TestOtherPrompts:
    """Answers belong to what was asked, not to an id; each prompt is answered once for both settings."""

    @staticmethod
    def asked(folder, records, encoding=USUAL, **source):
        sources = [SourceConfig(records=records, name="one", **source)]
        return run(folder, sources=sources, encoding=encoding) / len(SETTINGS)

    def test_edited_record_is_answered_again(self, tmp_path, caplog):
        records = chats(6)
        assert self.asked(tmp_path, records) == 6
        before = lines(tmp_path)
        records[2]["messages"][0]["content"] = "another question"
        assert self.asked(tmp_path, records) == 1
        assert "1 prompts of" in caplog.text and "have changed since they were answered" in caplog.text
        after = lines(tmp_path)
        assert [line["id"] for line in after] == [f"r{i}" for i in range(6)]
        assert after[2]["messages"][0]["content"] == "another question" and after[2] != before[2]
        assert after[:2] + after[3:] == before[:2] + before[3:]
        assert self.asked(tmp_path, records) == 0

    def test_edited_label_and_meta_reach_the_file(self, tmp_path):
        records = chats(3)
        self.asked(tmp_path, records)
        records[0]["label"], records[1]["meta"] = "new", {"new": 1}
        assert self.asked(tmp_path, records) == 2
        assert lines(tmp_path)[0]["label"] == "new" and lines(tmp_path)[1]["meta"] == {"new": 1}

    @pytest.mark.parametrize(
        ("encoding", "source", "expected"),
        [
            ({"max_length": 60}, {}, 2),  # only prompts that are longer
            ({"ignore_system_prompt": True}, {}, 1),
            (
                {"template": TemplateConfig(prefix="{role}: ", suffix=" ")},
                {},
                5,
            ),
            ({}, {"system_prompt": "Be brief."}, 5),
        ],
    )
    def test_other_settings_of_the_data(self, tmp_path, encoding, source, expected):
        turns = [{"role": role, "content": "a " * 40} for role in ("user", "assistant")]
        question = {"role": "user", "content": "a b"}
        records = [{"id": f"r{i}", "messages": [*turns * (i > 2), question]} for i in range(5)]
        records[0]["messages"].insert(0, {"role": "system", "content": "Be polite."})
        assert self.asked(tmp_path, records) == 5
        assert self.asked(tmp_path, records, EncodingConfig(**encoding), **source) == expected
        assert self.asked(tmp_path, records, EncodingConfig(**encoding), **source) == 0

    def test_answers_to_prompts_that_are_not_asked_stay(self, tmp_path):
        self.asked(tmp_path, chats(6))
        before = lines(tmp_path)
        assert self.asked(tmp_path, chats(2)) == 0
        assert lines(tmp_path) == before

    def test_lines_of_an_earlier_version_are_answered_again(self, tmp_path, caplog):
        self.asked(tmp_path, chats(4))
        before, file = lines(tmp_path), tmp_path / "out/greedy.jsonl"
        old = [{name: value for name, value in line.items() if name != "fingerprint"} for line in before]
        write_jsonl(file, [*old, {"id": "other", "dataset": "one"}])
        assert self.asked(tmp_path, chats(4)) == 4
        assert "4 prompts of" in caplog.text and "an earlier version has not noted" in caplog.text
        assert lines(tmp_path) == [*before, {"id": "other", "dataset": "one"}]

    def test_same_id_in_sources_of_one_name_is_refused(self, tmp_path):
        sources = [SourceConfig(records=chats(2, seed=seed), name="one") for seed in (0, 1)]
        with pytest.raises(ConfigError, match="two sources are named 'one', and both have a record 'r0'"):
            run(tmp_path, sources=sources)


def test_overwrite_removes_what_other_ranks_have_left(tmp_path):
    run(tmp_path)
    before = lines(tmp_path)
    stale = [{**line, "answers": []} for line in before]
    for rank in (0, 3):
        write_jsonl(tmp_path / f"out/greedy.jsonl.partial{rank}", [*stale, {**stale[0], "id": "gone"}])
    assert run(tmp_path, overwrite=True) == 24
    assert lines(tmp_path) == before
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_full_disk_is_one_message_and_loses_no_answer(tmp_path):
    run(tmp_path / "whole")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, usual[1]))
    try:
        with pytest.raises(
            ConfigError, match=r"greedy.jsonl.partial0: cannot be written \(File too large\). Free its disk"
        ):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    kept = (tmp_path / "out/greedy.jsonl.partial0").read_bytes()
    assert kept.endswith(b"\n") and kept.count(b"\n") >= 2
    assert run(tmp_path, generation=SETTINGS) < 24
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match=r"out: cannot be written \(File exists\)"):
        run(tmp_path)


def test_second_predict_into_the_same_folder_is_refused_until_the_first_ends_however_it_does(tmp_path):
    (tmp_path / "out").mkdir()
    code = f"import fcntl, sys; file = open({str(tmp_path / 'out/.lock')!r}, 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="out: another predict is writing here"):
            run(tmp_path)
        assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    finally:
        first.kill()
        first.communicate()
    assert run(tmp_path) == 24
    assert not (tmp_path / "out/.lock").exists()


def test_answers_of_other_weights_under_the_same_name_are_not_taken_for_these(tmp_path):
    base = base_model_folder(tmp_path / "base")
    module = SFTModule(BackboneConfig(base), generation={"greedy": DecodingConfig(max_new_tokens=2)})
    data = sft_data(module, chats(2), chats(2))
    out = str(tmp_path / "out")
    trainer(tmp_path, callbacks=[PredictionWriter(out)]).predict(module, data, return_predictions=False)
    state = load_file(tmp_path / "base/model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    again = SFTModule(BackboneConfig(base), generation={"greedy": DecodingConfig(max_new_tokens=2)})
    with pytest.raises(ConfigError, match=r"made with other settings \(weights"):
        data = sft_data(again, chats(2), chats(2))
        trainer(tmp_path, callbacks=[PredictionWriter(out)]).predict(again, data, return_predictions=False)
