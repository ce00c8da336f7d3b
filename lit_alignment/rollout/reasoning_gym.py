"""Tasks of the package reasoning-gym: records of prompts, and their own verifiers as a reward."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_alignment.data.sources.values import Misfit, plain
from lit_alignment.errors import ConfigError, require
from lit_alignment.rollout.rewards import RewardFunction, ScoreList, field_of

META = "reasoning_gym"  # what records have under `meta`


@dataclass(kw_only=True, eq=False)
class ReasoningGymReward(RewardFunction):
    """The score, from 0 to 1, that the verifier of a record's task gives, for records of `reasoning_gym_records`.

    Args:
        tag: Name of the tag that the final answer stands in, as `answer`; the last such part counts, and without one
            the score is 0. None takes the whole response.
        zero_on_error: Score 0 for an answer on which the verifier raises, as some do on what is not numeric; by default
            it ends the run.
        timeout: Seconds that the scores of one prompt may take; None waits.
    """

    tag: str | None = None
    zero_on_error: bool = False
    timeout: float | None = 60.0
    _tasks: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def start(self, device: torch.device) -> None:
        """Import the package, which takes seconds.

        Raises:
            ConfigError: If it is not installed.
        """
        require("reasoning_gym", "rl")

    def __call__(self, responses: list[str], record: dict[str, Any]) -> ScoreList:
        """The verifier's score of each."""
        stored = field_of(record, f"meta.{META}")
        if not isinstance(stored, dict) or not {"task", "settings", "entry"} <= stored.keys():
            raise ConfigError(f"the record has no 'meta.{META}'. Write its file with reasoning_gym_records.")
        made_of = json.dumps([stored["task"], stored["settings"]], sort_keys=True)
        task = self._tasks.get(made_of) or _dataset(stored["task"], 1, 0, stored["settings"])
        self._tasks[made_of] = task
        return [self._score(task, self._answer(response), stored) for response in responses]

    def _score(self, task: Any, answer: str | None, stored: dict[str, Any]) -> float:
        if answer is None:
            return 0.0
        try:
            return float(task.score_answer(answer, stored["entry"]))
        except Exception as error:  # of the verifiers each has its own
            if self.zero_on_error:
                return 0.0
            problem = f"the verifier of {stored['task']} raises {type(error).__name__} ({error}) on {answer[:200]!r}"
            raise ConfigError(f"{problem}. Set zero_on_error to score such answers 0.") from error

    def _answer(self, response: str) -> str | None:
        if self.tag is None:
            return response.strip()
        found = re.findall(rf"<{re.escape(self.tag)}>(.*?)</{re.escape(self.tag)}>", response, re.DOTALL)
        return found[-1].strip() if found else None


def reasoning_gym_records(task: str, size: int, seed: int = 0, **settings: Any) -> Iterator[dict[str, Any]]:
    """Chat records of a task: its question, its answer as the label, and under `meta` what its verifier needs.

    Args:
        task: Its name in the package, as `basic_arithmetic`.
        size: How many records.
        seed: Of the task's generator.
        settings: Of the task, such as its difficulty.

    Yields:
        `{id, messages, label, meta}`, with values that JSON has.

    Raises:
        ConfigError: If the package is not installed or refuses the task, or a record cannot be kept as JSON.
    """
    dataset = _dataset(task, size, seed, settings)
    for index in range(size):
        entry = dataset[index]
        try:
            kept, kept_settings = plain([entry, settings])
        except Misfit as misfit:
            problem = f"something of its record {index} {misfit.problem}"
            raise ConfigError(f"{task}: {problem}. A file cannot hold it: use another task.") from misfit
        if dataset.score_answer(kept["answer"], kept) != dataset.score_answer(entry["answer"], entry):
            raise ConfigError(f"{task}: its verifier gives another score once a record was a file. Use another task.")
        yield {
            "id": f"{task}-{seed}-{index}",
            "messages": [{"role": "user", "content": kept["question"]}],
            "label": kept["answer"],
            "meta": {META: {"task": task, "settings": kept_settings, "entry": kept}},
        }


def _dataset(task: str, size: int, seed: int, settings: dict[str, Any]) -> Any:
    """A task of the package, which says itself what it does not take."""
    package = require("reasoning_gym", "rl")
    try:
        return package.create_dataset(task, size=size, seed=seed, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"reasoning-gym refuses the task {task!r} with {settings} ({error}).") from error
