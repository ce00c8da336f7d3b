"""Responses before training, as `inspect --rollout` shows them."""

import re

import pytest

from lit_alignment.data.rollout import Answer, Group
from lit_alignment.errors import ConfigError
from lit_alignment.rollout.samplers import TransformersSampler
from lit_alignment.tools import inspect
from lit_alignment.tools.rollout import response_table, rollout_line, sample_rollout
from lit_alignment.trainer_cli import build_for_tool
from tests.helpers import weights

TINY = ["--config", "configs/policy/tiny.yaml"]


def answer(reward, advantage=0.0, truncated=False, **rewards):
    return Answer(
        token_ids=[1, 2], text="a\x1b[2J", truncated=truncated, rewards=rewards, reward=reward, advantage=advantage
    )


def test_a_rollout_is_shown_with_rewards_advantages_and_truncation(capsys):
    inspect.main([*TINY, "--number", "1", "--rollout", "2"])
    out = capsys.readouterr().out
    asked = re.findall(r"^rollout (\d): (train/train-\d+)", out, re.M)
    assert asked == [("1", "train/train-0"), ("2", "train/train-2")]
    assert "train 1: train/train-0 prompt" in out and "32 micro-batches of up to 4 prompts" in out
    rows = re.findall(r"^│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([+-][\d.]+) │ +(\d)( cut)? │", out, re.M)
    assert len(rows) == 16
    for reward, letters, length, _, tokens, cut in rows:
        assert float(reward) == pytest.approx(float(letters) + float(length), abs=0.01)
        assert (tokens == "8") == bool(cut)
    for group in (rows[:8], rows[8:]):
        assert sum(float(row[3]) for row in group) == pytest.approx(0, abs=0.01)
    assert re.search(r"^16 responses to 2 prompts, mean reward 0\.\d+, .*: 0, 1\d cut at the limit$", out, re.M)


def test_a_trial_is_the_first_rollout_of_training_and_takes_no_step(monkeypatch):
    drawn = []
    sample = TransformersSampler.sample

    def counted(self, requests, wanted_logps=True):
        drawn.append([list(request.token_ids) for request in requests])
        return sample(self, requests, wanted_logps)

    monkeypatch.setattr(TransformersSampler, "sample", counted)
    cli = build_for_tool([*TINY, "--model.init_args.rollout.max_new_tokens=4"])
    groups = sample_rollout(cli, 3)
    assert [len(prompts) for prompts in drawn] == [3] and drawn[0] == [group.prompt for group in groups]
    assert cli.model.trainer.global_step == 0 and all(len(group.answers) == 8 for group in groups)
    before = weights(cli.model)
    again = sample_rollout(cli, 3)
    assert [a.text for g in again for a in g.answers] == [a.text for g in groups for a in g.answers]
    assert all(bool((weights(cli.model)[name] == value).all()) for name, value in before.items())


def test_other_methods_and_splits_are_refused():
    with pytest.raises(ConfigError, match="--rollout needs a module that samples responses in training, not SFTModule"):
        inspect.main(["--config", "configs/sft/tiny.yaml", "--rollout", "1"])
    with pytest.raises(ConfigError, match="leave --split predict out"):
        inspect.main([*TINY, "--split", "predict", "--rollout", "1"])


def test_responses_without_a_reward_are_counted_and_shown_without_one():
    nan = float("nan")
    group = Group(index=0, prompt=[1], answers=[answer(2.0, 0.5, x=2.0, y=nan), answer(nan, 0.0, True, x=nan, y=nan)])
    level = Group(index=1, prompt=[1], answers=[answer(1.0), answer(1.0)])
    assert rollout_line([group, level]) == (
        "4 responses to 2 prompts, mean reward 1.33, prompts whose responses all have the same reward: 1, "
        "1 cut at the limit, 1 not scored"
    )
    cells = [list(column.cells) for column in response_table(group).columns]
    assert cells[:4] == [["2", ""], ["2", ""], ["+0.500", "+0.000"], ["2", "2 cut"]]
    assert [str(cell) for cell in cells[4]] == ["a\\x1b[2J"] * 2
