"""Scores of many prompts' responses by several reward functions, the slow ones beside each other.

F functions, B responses of all prompts
"""

import asyncio
import inspect
import math
import sysconfig
import threading
import time
import traceback
from collections import deque
from collections.abc import Coroutine, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_alignment.data.encoding.messages import LARGEST
from lit_alignment.errors import AlignmentError, ConfigError, RewardError
from lit_alignment.rollout.rewards import RewardFunction, ScoreList

Group = tuple[list[str], dict[str, Any]]  # the responses to a prompt, and its record
# Whose lines tell a user nothing about a function of their own.
LIBRARIES = (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))


@dataclass(frozen=True)
class Scores:
    """What responses are worth, in fp64; NaN is not scored.

    Args:
        values: By each function, [F, B].
        rewards: Their weighted sum, [B].
    """

    values: Tensor
    rewards: Tensor


class RewardPool:
    """Scores the responses of a rollout.

    reward of a response = sum over the functions that scored it of weight * score

    A response that no function with a weight has scored has no reward: it is NaN. Functions that are `inline` run in
    the calling thread, the others in threads; results depend on neither.

    Args:
        functions: What scores.
        workers: How many prompts are scored beside each other by functions that are not inline.

    Raises:
        ConfigError: If there is nothing to score with, or two functions have one name.
    """

    def __init__(self, functions: Sequence[RewardFunction], workers: int = 16) -> None:
        """Check the functions; `start` loads what they need."""
        self.functions, self.workers = list(functions), workers
        self.names = [function.name for function in self.functions]
        if not any(function.weight for function in self.functions):
            raise ConfigError("model.rewards: there is no reward with a weight other than 0. Give at least one.")
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"model.rewards: two are named '{twice}'. Give one of them another 'name'.")
        if workers < 1:
            raise ConfigError(f"model.reward_workers is {workers}; use 1 or more.")
        self._loop = _EventLoop()

    def start(self, device: torch.device) -> None:
        """Load what the functions need.

        Args:
            device: That of the policy.
        """
        for function in self.functions:
            function.start(device)

    def close(self) -> None:
        """Let go of what they hold."""
        self._loop.close()
        for function in self.functions:
            function.close()

    def score(self, groups: Sequence[Group], names: Sequence[str] | None = None) -> Scores:
        """Scores of all responses, in the order of the groups.

        Args:
            groups: The responses to each prompt, with its record.
            names: Of the records, for messages; by default their ids, or their positions here.

        Raises:
            RewardError: Naming function and record, if one fails, takes too long, or gives no list of scores.
        """
        if names is None:
            names = [str(record.get("id", f"[{index}]")) for index, (_, record) in enumerate(groups)]
        calls = [
            _Call(function, responses, record, f"model.rewards.{function.name}: record '{name}'")
            for function in self.functions
            for (responses, record), name in zip(groups, names, strict=True)
        ]
        threads = _Threads([call for call in calls if not call.function.inline], self._loop, self.workers)
        try:
            for call in calls:
                if call.function.inline:
                    call.run(self._loop)
            threads.join()
        except BaseException:
            threads.stop()
            self._loop.close()  # with what still runs in it
            raise
        values = torch.tensor([score for call in calls for score in call.scores], dtype=torch.float64)
        values = values.view(len(self.functions), sum(len(responses) for responses, _ in groups))
        weights = torch.tensor([function.weight for function in self.functions], dtype=torch.float64)
        weighted = (weights[:, None] * values)[weights != 0]
        return Scores(values, weighted.nansum(0).masked_fill(weighted.isnan().all(0), math.nan))


@dataclass(eq=False)
class _Call:
    """One function on the responses to one prompt.

    Args:
        function: What scores.
        responses: What is scored.
        record: The prompt's record.
        what: Function and record, as messages begin.
        scores: What came of it; NaN is not scored.
        error: What went wrong.
    """

    function: RewardFunction
    responses: list[str]
    record: dict[str, Any]
    what: str
    scores: list[float] = field(default_factory=list)
    error: RewardError | None = None

    def run(self, loop: "_EventLoop") -> None:
        """Score.

        Args:
            loop: Where coroutines run.

        Raises:
            RewardError: If the function raises, or gives something else than scores.
        """
        try:
            # Copies: what one function changes in a record must not reach another one.
            given: Any = self.function(list(self.responses), deepcopy(self.record))
            if inspect.iscoroutine(given):
                given = loop.result(given)
        except AlignmentError as error:
            raise RewardError(f"{self.what}: {error}") from error
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500]} ({_raised_at(error)})"
            fix = "Correct the function, or let it give None for what it cannot score."
            raise RewardError(f"{self.what}: the function has raised {problem}. {fix}") from error
        self.scores = self._read(given)

    def late(self) -> RewardError:
        """The error of a call that takes too long."""
        seconds = f"{self.function.timeout:g} s"
        return RewardError(f"{self.what}: not scored after {seconds}. Raise 'timeout' of it, or make it faster.")

    def _read(self, given: Any) -> list[float]:
        number = len(self.responses)
        if not isinstance(given, list | tuple):
            raise RewardError(f"{self.what}: gave {type(given).__name__}. Return a list of {number} numbers or None.")
        if len(given) != number:
            raise RewardError(f"{self.what}: gave {len(given)} scores for {number} responses. Return one for each.")
        return [self._number(value, index) for index, value in enumerate(given)]

    def _number(self, value: Any, index: int) -> float:
        if value is None:
            return math.nan
        if not isinstance(value, Real | np.bool_):
            raise RewardError(f"{self.what}: score {index} is of type {type(value).__name__}. Return a number or None.")
        if not abs(float(value)) <= LARGEST:
            raise RewardError(f"{self.what}: score {index} is {float(value)}. Return a finite number, or None.")
        return float(value)


class _Threads:
    """Runs calls beside each other in threads that do not keep the process from ending.

    Args:
        calls: What to run, in this order.
        loop: Where coroutines run.
        number: How many threads.
    """

    def __init__(self, calls: Sequence[_Call], loop: "_EventLoop", number: int) -> None:
        """Begin."""
        self._waiting, self._loop = deque(calls), loop
        self._running: dict[_Call, float] = {}  # and when they began
        self._failed: list[_Call] = []
        self._changed = threading.Condition()
        for _ in range(min(number, len(calls))):
            threading.Thread(target=self._work, name="reward", daemon=True).start()

    def join(self) -> None:
        """Wait for all calls.

        Raises:
            RewardError: As soon as one has failed or takes too long.
        """
        with self._changed:
            while self._waiting or self._running:
                self._check()
                left = [self._deadline(call) - time.monotonic() for call in self._running]
                wait = min(left, default=math.inf)
                self._changed.wait(None if math.isinf(wait) else max(wait, 0.0))
            self._check()

    def stop(self) -> None:
        """Begin no further call."""
        with self._changed:
            self._waiting.clear()

    def _check(self) -> None:
        failed = next((call.error for call in self._failed if call.error is not None), None)
        late = next((call.late() for call in self._running if time.monotonic() > self._deadline(call)), None)
        if (error := failed or late) is not None:
            raise error

    def _deadline(self, call: _Call) -> float:
        return math.inf if call.function.timeout is None else self._running[call] + call.function.timeout

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    return
                call = self._waiting.popleft()
                self._running[call] = time.monotonic()
                self._changed.notify()  # there is another deadline
            try:
                call.run(self._loop)
            except RewardError as error:
                call.error = error
            except BaseException as error:  # such as sys.exit, which would end this thread and nothing else
                call.error = RewardError(f"{call.what}: the function has raised {type(error).__name__}.")
                call.error.__cause__ = error
            with self._changed:
                if call.error is None and time.monotonic() > self._deadline(call):  # and nobody was looking
                    call.error = call.late()
                if call.error is not None:
                    self._failed.append(call)
                del self._running[call]
                self._changed.notify()


class _EventLoop:
    """An event loop in a thread of its own, one for a run: clients that functions keep open belong to their loop."""

    def __init__(self) -> None:
        """No coroutine has come yet."""
        self._lock = threading.Lock()
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread] | None = None

    def result(self, coroutine: Coroutine[Any, Any, ScoreList]) -> ScoreList:
        """What a coroutine gives; any thread may ask."""
        with self._lock:
            if self._running is None:
                loop, stop = asyncio.new_event_loop(), asyncio.Event()
                thread = threading.Thread(target=_run_until, args=(loop, stop), name="reward-loop", daemon=True)
                self._running = loop, stop, thread
                thread.start()
            future = asyncio.run_coroutine_threadsafe(_outcome(coroutine), self._running[0])
        scores = future.result()
        if isinstance(scores, BaseException):
            raise scores
        return scores

    def close(self) -> None:
        """Cancel what still runs; a later coroutine has another loop."""
        with self._lock:
            if self._running is None:
                return
            loop, stop, thread = self._running
            self._running = None
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
            thread.join(1.0)  # what blocks the loop ends with the process


async def _outcome(coroutine: Coroutine[Any, Any, ScoreList]) -> ScoreList | BaseException:
    """What a coroutine gives, or what it raises where that would end the loop with all the others in it."""
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        return error


def _run_until(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(stop.wait())


def _raised_at(error: BaseException) -> str:
    """File and line of the last call in the user's own code."""
    lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    own = [each for each in lines if not each[0].startswith(LIBRARIES)]
    file, number = (own or lines)[-1]
    return f"{file}:{number}"
