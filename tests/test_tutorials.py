"""The tutorials do what they say: every file and command of a page, in order, in an empty folder."""

import json
import re

import pytest

from tests.helpers import ROOT, base_model_folder
from tests.helpers.pages import Follower, read_steps

CHATS, REWARDS = (ROOT / f"configs/tutorials/{name}.md" for name in ("chats-to-server", "reward-to-dpo"))
ANSWERS = ("lit-alignment chat", "curl", "python ask.py", "python look.py")  # what the model says
TOKENS = ("lit-alignment inspect", "lit-alignment estimate")  # what its tokenizer and its size decide
# Of the real model: what is small enough for a test.
MODEL, ADAPTED = "HuggingFaceTB/SmolLM2-135M-Instruct", "[15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Follows a page with a tiny random model, and trains on two batches."""
    monkeypatch.setenv("COLUMNS", "80")
    (folder := tmp_path / "new").mkdir()
    steps = {name: "step=2" for page in (CHATS, REWARDS) for name in re.findall(r"step=\d+", page.read_text())}
    model = base_model_folder(tmp_path / "SmolLM2-135M-Instruct")
    few = [f"--trainer.limit_{stage}_batches={number}" for stage, number in (("train", 2), ("val", 1))]
    few += ["--trainer.max_epochs=1"]
    return Follower(
        folder,
        {MODEL: model, ADAPTED: "[0]", **steps},
        {"fit": [*few, "--trainer.enable_progress_bar=false"], "chat": ["--max-new-tokens", "8"]},
        ("pip ", "lit-alignment fetch"),
    )


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Follows a page as it stands, with the user's own cache of models."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("LIT_ALIGNMENT_CACHE")
    (folder := tmp_path / "new").mkdir()
    return Follower(folder)


def check_words(steps, *varying):
    """All that a page shows was said, but for its figures, and for what some commands say."""
    assert len(steps) > 8
    missing = {step.command: step.missing() for step in steps if not step.command.startswith(varying)}
    assert not {command: lines for command, lines in missing.items() if lines}


def claimed_and_measured(steps, name):
    """A figure of each `evaluate` or `test` of a page that shows it: as the page has it, and as it came out."""
    return [
        (step.claimed(name), step.figure(name))
        for step in steps
        if step.command.startswith(("lit-alignment evaluate", "lit-alignment test")) and name in "".join(step.shown)
    ]


@pytest.mark.slow
def test_chats_become_a_server_that_answers(tiny):
    with tiny.follow(CHATS) as steps:
        check_words(steps, *ANSWERS, *TOKENS)
    by_command = {step.command.split()[0]: step.said for step in steps}
    assert json.loads(by_command["curl"])["choices"][0]["message"]["content"].strip()
    assert by_command["python"].strip()
    (first, *_), lines = ((tiny.folder / name).read_text().splitlines() for name in ("chats.jsonl", "export.csv"))
    assert [message["role"] for message in json.loads(first)["messages"]] == ["system", "user", "assistant"]
    assert len(lines) > 6


@pytest.mark.slow
def test_judged_pairs_become_a_judge_better_answers_and_dpo(tiny):
    with tiny.follow(REWARDS) as steps:
        check_words(steps, *ANSWERS)
    pairs = [json.loads(line) for line in (tiny.folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 20 and all(pair["margin"] >= 0 and pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.tutorial
@pytest.mark.timeout(3600)
def test_chats_become_a_server_that_answers_as_the_page_says(real):
    with real.follow(CHATS) as steps:
        check_words(steps, *ANSWERS)
    ((claimed, measured),) = claimed_and_measured(steps, "exact_match")
    assert abs(measured - claimed) <= 0.15  # as the page says of other machines
    said = next(step.said for step in steps if step.command.startswith("curl"))
    routed = json.loads(json.loads(said)["choices"][0]["message"]["content"])
    assert routed.keys() == {"queue", "product", "order", "urgent"} and routed["order"] == "A1205"


@pytest.mark.tutorial
@pytest.mark.timeout(3600)
def test_judged_pairs_have_the_figures_of_the_page(real):
    with real.follow(REWARDS) as steps:
        check_words(steps, *ANSWERS)
    ((claimed, measured),) = claimed_and_measured(steps, "accuracy")
    assert abs(measured - claimed) <= 0.06
    (_, any_answer), (_, best_answer), *_ = claimed_and_measured(steps, "exact_match")
    assert best_answer > any_answer
    (_, before), (_, after) = claimed_and_measured(steps, "reward")
    assert after > before - 1.5  # not spoiled, as at rates that the page warns of


def test_words_of_a_page_are_compared_without_figures_and_what_is_left_out():
    (step,) = read_steps("$ say\na 3.5 of 10\n...\nfile: runs/version_0/... (ok)\n│ x │ 7% │ ██ │\n")
    step.said = "a 41 of 1,000\nfile: runs/version_0/checkpoints/a.ckpt (ok)\n│ x │ 12% │ │"
    assert step.command == "say" and step.missing() == []
    step.said = step.said.replace("version_0", "version_1").replace("a 41", "b 41")
    assert len(step.missing()) == 2


def test_a_step_goes_on_behind_a_backslash_and_ends_at_the_next():
    first, second = read_steps('$ one \\\n    "a b"\n1\n2\n$ two\n')
    assert first.command.split() == ["one", '"a', 'b"'] and first.shown == ["1", "2"]
    assert (second.command, second.shown) == ("two", [])


def test_figure_is_the_first_number_behind_its_name():
    (step,) = read_steps("$ evaluate\n│ exact_match │ 0.59 │ 100 prompts │\n")
    step.said = "│ exact_match │ -0.25 │ 100 prompts │"
    assert (step.claimed("exact_match"), step.figure("exact_match")) == (0.59, -0.25)
