"""Scores of several functions: their order, their sum, what is not scored, and what ends a run."""

import asyncio
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from lit_alignment.errors import ConfigError, RewardError
from lit_alignment.rollout import ExactMatchReward, LengthReward, PythonReward, RewardFunction, RewardPool
from tests.helpers import ROOT

MODULE = """
import asyncio, time

def count(responses, record, step=1.0):
    return [step * len(each) for each in responses]

async def slow_count(responses, record):
    await asyncio.sleep(record["seconds"])
    return [float(len(each)) for each in responses]

def broken(responses, record):
    return [record["total"] for each in responses]

async def broken_later(responses, record):
    await asyncio.sleep(0)
    return broken(responses, record)

def blocks(responses, record):
    time.sleep(30)

async def waits(responses, record):
    await asyncio.sleep(30)

async def blocks_the_loop(responses, record):
    time.sleep(30)

not_a_function = 3
"""


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """A module of the working directory."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "my_rewards.py"
    sys.modules.pop("my_rewards", None)


@dataclass(kw_only=True, eq=False)
class Gives(RewardFunction):
    """Gives what it is told, after some time."""

    values: object
    seconds: float = 0.0

    def __call__(self, responses, record):
        time.sleep(record.get("seconds", self.seconds))
        return self.values(responses, record) if callable(self.values) else self.values


@dataclass(kw_only=True, eq=False)
class GivesInline(Gives):
    inline: ClassVar[bool] = True


def groups(*sizes, **fields):
    return [([f"{g}{i}" for i in range(size)], {"id": f"r{g}", **fields}) for g, size in enumerate(sizes)]


def test_a_reward_is_the_weighted_sum_over_the_functions_that_scored():
    nan = math.nan
    functions = [
        Gives(name="a", weight=2.0, values=[1, None, None, None, True]),
        Gives(name="b", weight=-0.5, values=(0.5, 3, None, None, np.float32(2))),
        Gives(name="logged", weight=0.0, values=[7, 7, 7, None, np.bool_(False)]),
    ]
    scores = RewardPool(functions).score(groups(5))
    expected = [[1, nan, nan, nan, 1], [0.5, 3, nan, nan, 2], [7, 7, 7, nan, 0]]
    torch.testing.assert_close(scores.values, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    rewards = torch.tensor([2 - 0.25, -1.5, nan, nan, 2 - 1.0], dtype=torch.float64)
    torch.testing.assert_close(scores.rewards, rewards, equal_nan=True)


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_the_order_of_scores_is_that_of_the_groups_whatever_finishes_first(workers):
    asked = groups(2, 3, 1, 2)
    for position, (_, record) in enumerate(asked):
        record["seconds"] = 0.05 * (3 - position)
    own = lambda responses, record: [float(each) for each in responses]  # noqa: E731
    pool = RewardPool([Gives(name="slow", values=own), GivesInline(name="inline", values=own)], workers)
    scores = pool.score(asked)
    assert scores.values.tolist() == [[0, 1, 10, 11, 12, 20, 30, 31]] * 2
    assert pool.names == ["slow", "inline"]


def test_slow_functions_run_beside_each_other_plain_and_async(my_rewards):
    pool = RewardPool([Gives(name="plain", values=[1.0]), PythonReward(function="my_rewards.slow_count")], workers=32)
    started = time.monotonic()
    scores = pool.score(groups(*[1] * 16, seconds=0.2))
    assert time.monotonic() - started < 1.5  # one after the other: 6.4 s
    assert scores.values.tolist() == [[1.0] * 16, [2.0] * 10 + [3.0] * 6]
    pool.close()


def test_workers_bound_how_many_prompts_are_scored_at_once():
    now, most, lock = 0, 0, threading.Lock()

    def counted(responses, record):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return [0.0]

    RewardPool([Gives(values=counted)], workers=3).score(groups(*[1] * 12))
    assert most == 3


def test_coroutines_of_all_calls_and_steps_share_one_loop():
    loops = set()

    class Keeps(RewardFunction):
        async def __call__(self, responses, record):
            loops.add(asyncio.get_running_loop())
            return [0.0] * len(responses)

    pool = RewardPool([Keeps()])
    for _ in range(2):
        pool.score(groups(1, 2, 3))
    assert len(loops) == 1
    pool.close()
    assert not loops.pop().is_running()


def test_what_a_function_changes_in_a_record_reaches_no_other():
    def takes(responses, record):
        responses.clear()
        return [record.pop("label")["value"]]

    asked = groups(1, label={"value": 3})
    scores = RewardPool([Gives(name="a", values=takes), GivesInline(name="b", values=takes)]).score(asked)
    assert scores.values.tolist() == [[3.0], [3.0]]
    assert asked == groups(1, label={"value": 3})


def test_no_responses_have_no_scores():
    pool = RewardPool([Gives(name="a", values=[]), GivesInline(name="b", values=[])])
    for asked in ([], groups(0, 0)):
        scores = pool.score(asked)
        assert scores.values.shape == (2, 0)
        assert scores.rewards.shape == (0,)


@pytest.mark.parametrize("kind", [Gives, GivesInline])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "gave NoneType. Return a list of 2 numbers"),
        (1.0, "gave float"),
        (np.ones(2), "gave ndarray"),
        ([1.0], "gave 1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "gave 3 scores for 2 responses"),
        ([1.0, "2"], "score 1 is of type str"),
        ([torch.tensor(1.0), 2.0], "score 0 is of type Tensor"),
        ([1.0, math.nan], "score 1 is nan. Return a finite number, or None"),
        ([-math.inf, 1.0], "score 0 is -inf"),
        ([1.0, 1e39], "score 1 is 1e[+]39"),
    ],
)
def test_what_is_no_list_of_scores_ends_the_run_with_the_name_of_the_record(kind, values, message):
    pool = RewardPool([kind(name="mine", values=values)])
    with pytest.raises(RewardError, match=f"^model.rewards.mine: record 'r0': {message}"):
        pool.score(groups(2))


def test_a_function_that_raises_ends_the_run_with_its_record_and_its_own_line(my_rewards):
    for name in ("broken", "broken_later"):
        pool = RewardPool([PythonReward(function=f"my_rewards.{name}")])
        asked = [(["a"], {"id": "first", "total": 1}), (["b"], {"id": "second"})]
        with pytest.raises(RewardError) as raised:
            pool.score(asked)
        assert f"model.rewards.{name}: record 'second': the function has raised KeyError: 'total'" in str(raised.value)
        assert f"({my_rewards}:12)" in str(raised.value)
        assert isinstance(raised.value.__cause__, KeyError)


def test_records_are_named_by_the_caller_or_by_their_position():
    pool = RewardPool([ExactMatchReward()])
    asked = [(["a"], {"prompt": "b", "label": "a"}), (["a"], {"prompt": "b"})]
    with pytest.raises(RewardError, match=r"record '\[1\]': the record has no last message"):
        pool.score(asked)
    with pytest.raises(RewardError, match="record 'train/17'"):
        pool.score(asked, names=["train/16", "train/17"])


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_a_function_that_would_end_its_thread_ends_the_run(error):
    def leaves(responses, record):
        raise error

    async def leaves_the_loop(responses, record):
        raise error

    for values in (leaves, leaves_the_loop):
        with pytest.raises(RewardError, match=f"the function has raised {type(error).__name__}"):
            RewardPool([Gives(values=values)]).score(groups(1, 1))


def test_a_function_that_raises_is_not_waited_for_by_slow_ones():
    def broken(responses, record):
        raise ValueError("no")

    started = time.monotonic()
    with pytest.raises(RewardError, match="ValueError: no"):
        RewardPool([Gives(name="slow", values=[0.0], seconds=5.0), Gives(name="bad", values=broken)]).score(groups(1))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("function", ["blocks", "waits", "blocks_the_loop"])
def test_a_function_that_takes_too_long_ends_the_run_in_time(function, my_rewards):
    pool = RewardPool([PythonReward(name="judge", function=f"my_rewards.{function}", timeout=0.2)])
    started = time.monotonic()
    with pytest.raises(RewardError, match="model.rewards.judge: record 'r0': not scored after 0.2 s. Raise 'timeout'"):
        pool.score(groups(1, 1))
    assert time.monotonic() - started < 2


def test_a_late_score_is_late_also_where_nobody_was_waiting():
    busy = lambda responses, record: time.sleep(0.4) or [0.0]  # noqa: E731
    pool = RewardPool([Gives(name="late", values=[0.0], seconds=0.2, timeout=0.1), GivesInline(values=busy)])
    with pytest.raises(RewardError, match="model.rewards.late"):
        pool.score(groups(1))


def test_the_time_of_a_call_does_not_begin_before_it_does():
    pool = RewardPool([Gives(values=[0.0], seconds=0.1, timeout=0.5)], workers=1)
    assert pool.score(groups(*[1] * 8)).rewards.tolist() == [0.0] * 8


@pytest.mark.slow  # another process imports everything
def test_stuck_functions_do_not_keep_the_process(my_rewards):
    code = """
from lit_alignment.errors import RewardError
from lit_alignment.rollout import PythonReward, RewardPool
for name in ("blocks", "waits", "blocks_the_loop"):
    try:
        RewardPool([PythonReward(function=f"my_rewards.{name}", timeout=0.2)]).score([(["a"], {"id": "r1"})])
    except RewardError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=my_rewards.parent, env=environment, timeout=25
    )
    assert (done.returncode, done.stderr, done.stdout.count("record 'r1': not scored after 0.2 s")) == (0, "", 3)


def test_hooks_are_called_with_the_device():
    seen = []

    class Loads(LengthReward):
        def start(self, device):
            seen.append(device)

        def close(self):
            seen.append("closed")

    pool = RewardPool([Loads(maximum=3)])
    pool.start(torch.device("cpu"))
    pool.close()
    assert seen == [torch.device("cpu"), "closed"]


@pytest.mark.parametrize(
    ("functions", "workers", "message"),
    [
        ([], 1, "no reward with a weight other than 0"),
        ([LengthReward(maximum=1, weight=0.0)], 1, "no reward with a weight other than 0"),
        ([LengthReward(maximum=1), LengthReward(maximum=2)], 1, "two are named 'length'"),
        ([LengthReward(maximum=1)], 0, "reward_workers is 0"),
    ],
)
def test_a_pool_refuses_what_cannot_score(functions, workers, message):
    with pytest.raises(ConfigError, match=message):
        RewardPool(functions, workers)


# Functions by their path.


def test_a_function_of_the_working_directory_gets_its_arguments(my_rewards):
    reward = PythonReward(function="my_rewards.count", arguments={"step": 0.5}, weight=3.0)
    assert (reward.name, reward.timeout) == ("count", 600.0)
    assert RewardPool([reward]).score(groups(2)).rewards.tolist() == [3.0, 3.0]
    assert sys.path[-1] == str(my_rewards.parent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "count"}, "use a dotted path"),
        ({"function": "my_reward.count"}, "No module named 'my_reward'; looked from"),
        ({"function": "my_rewards.counts"}, "has no attribute 'counts'"),
        ({"function": "my_rewards.not_a_function"}, "is no function, but int"),
        ({"function": "my_rewards.count", "arguments": {"steps": 1}}, "unexpected keyword argument 'steps'"),
        ({"function": "my_rewards.count", "timeout": 0.0}, "timeout is 0.0; use more than 0 seconds"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_the_run(settings, message, my_rewards):
    with pytest.raises(ConfigError, match=f"model.rewards.*{message}"):
        PythonReward(**settings)


def test_a_module_that_does_not_load_says_why(my_rewards):
    my_rewards.with_name("bad_rewards.py").write_text("def score(:\n")
    with pytest.raises(ConfigError, match="bad_rewards.score cannot be imported .SyntaxError"):
        PythonReward(function="bad_rewards.score")


def test_a_configuration_names_rewards_by_their_class(my_rewards):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[RewardFunction] | None)
    given = [
        {"class_path": "lit_alignment.rollout.ExactMatchReward", "init_args": {"weight": 2.0, "field": "meta.answer"}},
        {"class_path": "lit_alignment.rollout.PythonReward", "init_args": {"function": "my_rewards.count"}},
    ]
    exact, counted = parser.instantiate(parser.parse_object({"rewards": given})).rewards
    assert (exact.weight, exact.field, exact.name) == (2.0, "meta.answer", "exact_match")
    assert counted(["abc"], {}) == [3.0]
