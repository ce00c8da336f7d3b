"""Tasks with verifiers: what is written of them, and that it is scored as the package scores it."""

import json
import sys

import pytest
import torch

from lit_alignment.data.encoding.messages import read_record
from lit_alignment.errors import ConfigError
from lit_alignment.rollout import ReasoningGymReward, RewardPool, reasoning_gym_records

TASKS = ["basic_arithmetic", "countdown", "leg_counting"]


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'lit-alignment\[rl\]'"):
        ReasoningGymReward().start(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"pip install 'lit-alignment\[rl\]'"):
        next(reasoning_gym_records("leg_counting", 1))


@pytest.mark.parametrize("task", TASKS)
def test_a_record_from_a_file_is_scored_by_the_verifier_of_its_task(task):
    gym = pytest.importorskip("reasoning_gym")
    written = [json.loads(json.dumps(record)) for record in reasoning_gym_records(task, 4, seed=3)]
    dataset = gym.create_dataset(task, size=4, seed=3)
    asked = [([record["label"], "17 bananas", ""], record) for record in written]
    scores = RewardPool([ReasoningGymReward()]).score(asked).values.view(4, 3)
    for index, (record, found) in enumerate(zip(written, scores.tolist(), strict=True)):
        entry = dataset[index]
        assert read_record(record, "", 0).messages == [{"role": "user", "content": entry["question"]}]
        assert (record["id"], record["label"]) == (f"{task}-3-{index}", entry["answer"])
        assert found == [dataset.score_answer(answer, entry) for answer in (entry["answer"], "17 bananas", "")]
        assert found[0] == 1


def test_the_answer_is_read_from_its_tag():
    pytest.importorskip("reasoning_gym")
    (record,) = reasoning_gym_records("leg_counting", 1)
    answer = record["label"]
    responses = [f"<answer>0</answer> no:\n<answer>\n{answer} </answer>", f"{answer}", f"<answer>{answer}1</answer>"]
    assert ReasoningGymReward(tag="answer")(responses, record)[:2] == [1, 0]


def test_settings_of_a_task_reach_its_generator_and_stand_in_the_record():
    pytest.importorskip("reasoning_gym")
    (record,) = reasoning_gym_records("leg_counting", 1, min_animals=7, max_animals=7)
    assert len(record["meta"]["reasoning_gym"]["entry"]["metadata"]["animals"]) == 7
    assert record["meta"]["reasoning_gym"]["settings"] == {"min_animals": 7, "max_animals": 7}


def test_an_answer_on_which_a_verifier_raises_is_named_or_has_no_credit():
    pytest.importorskip("reasoning_gym")
    (record,) = reasoning_gym_records("prime_factorization", 1)
    responses = ["17 bananas", record["label"]]
    with pytest.raises(
        ConfigError, match="prime_factorization raises ValueError .* on '17 bananas'. Set zero_on_error"
    ):
        ReasoningGymReward()(responses, record)
    assert ReasoningGymReward(zero_on_error=True)(responses, record) == [0, 1]


def test_a_task_whose_verifier_needs_more_than_json_is_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="rearc: its verifier gives another score once a record was a file"):
        next(reasoning_gym_records("rearc", 1))
    with pytest.raises(ConfigError, match="composite: something of its record 0 is of the type DatasetSpec"):
        from reasoning_gym.composite import DatasetSpec

        next(reasoning_gym_records("composite", 1, datasets=[DatasetSpec("leg_counting", 1.0, {})]))


def test_what_the_package_refuses_is_one_message():
    pytest.importorskip("reasoning_gym")
    for task, settings in (
        ("no_such_task", {}),
        ("leg_counting", {"animals": 3}),
        ("leg_counting", {"min_animals": 0}),
    ):
        with pytest.raises(ConfigError, match=f"reasoning-gym refuses the task '{task}'"):
            next(reasoning_gym_records(task, 1, **settings))


def test_a_record_of_another_source_is_named():
    with pytest.raises(ConfigError, match="the record has no 'meta.reasoning_gym'"):
        ReasoningGymReward()(["4"], {"prompt": "two and two", "meta": "calculus"})
