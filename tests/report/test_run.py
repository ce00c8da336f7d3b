"""The data of a page, in a file and back, and settings from a configuration."""

import time

import pytest

from lit_alignment.errors import ConfigError
from lit_alignment.evaluation.samples import Confusion, NotableResponse
from lit_alignment.report.run import CherryPick, Judge, TrainingRun, read_run, to_json
from lit_alignment.report.settings import asked_first, differing, flat
from lit_alignment.report.words import word_changes

PICK = CherryPick(
    "d", "1", [{"role": "user", "content": "? \ud800"}], {"label": None}, {0: "a"}, {0: True}, {0: {"x": 1.0}}
)
CONFIG = """
seed_everything: 7
trainer: {max_epochs: 2, max_steps: -1, precision: null}
model:
  class_path: lit_alignment.PreferenceModule
  init_args: {losses: [{kind: sigmoid, beta: 0.1}], optimizer: {learning_rate: 5.0e-05}}
"""


def test_run_comes_back_from_its_file(tmp_path):
    run = TrainingRun("SFT", "tiny", ["a"], "f", {"device": "CPU"}, CONFIG, {"val/loss": [(1, 2.0), (4, 1.0)]})
    run.judge, run.picks, run.confusion = Judge("val/loss"), [PICK], Confusion([[1]], ["a"])
    run.notable = [NotableResponse("best", [], "x", {"reward": 1.0}, False)]
    (tmp_path / "report.json").write_text(to_json(run))
    assert read_run(tmp_path) == run and run.best == (4, 1.0) and run.last_step == 4


@pytest.mark.parametrize("text", ["{}", '{"version": 0}', "[]", "{", '{"version": 1, "judge": null}'])
def test_file_that_no_training_wrote_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match="report.json"):
        read_run(tmp_path)


def test_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no report.json in it. Name the folder of a run"):
        read_run(tmp_path)


def test_settings_are_flat_and_those_asked_first_have_headings():
    settings = flat(CONFIG)
    assert settings["model.losses.0.beta"] == 0.1 and "init_args" not in str(settings)
    assert asked_first(settings) == {
        "learning rate": "5e-05",
        "epochs": "2",
        "loss": "sigmoid",
        "beta": "0.1",
        "seed": "7",
    }
    assert flat(": {") == {}


def test_settings_that_differ_are_those_of_no_other_value():
    assert differing([{"a": 1, "b": 0.5}, {"a": 1, "b": 2e-5, "c": None}]) == {"b": ["0.5", "2e-05"]}


def test_words_that_differ():
    changes = word_changes("a b c", "a x c d ")
    assert changes == (("same", "a"), ("del", " b"), ("ins", " x"), ("same", " c"), ("ins", " d "))
    assert word_changes("all of this", "is not that") == (("same", "is not that"),)
    assert word_changes("", "a") == (("same", "a"),) and word_changes("a", "  ") == (("same", "  "),)
    for text in ('{"queue": "billing",\n "urgent": true}', " leads, and ends ", "a b"):
        assert "".join(piece for kind, piece in word_changes('{"queue": "a b leads"}', text) if kind != "del") == text


def test_text_that_repeats_itself_is_compared_at_once():
    begin = time.perf_counter()
    word_changes("the cat " * 500, "the dog " * 500)
    assert time.perf_counter() - begin < 2
