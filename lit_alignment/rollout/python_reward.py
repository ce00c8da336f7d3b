"""A function of the user's own as a reward."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from lit_alignment.rollout.rewards import Given, RewardFunction


@dataclass(kw_only=True, eq=False)
class PythonReward(RewardFunction):
    """What a function gives: `(responses, record) -> list[float | None]`, plain or `async`.

    Several prompts are scored at the same time, plain functions in threads and `async` ones in one event loop.

    Args:
        function: Its dotted path, as `my_rewards.score`; modules of the working directory are found, too.
        arguments: Further arguments of it, by name.
        timeout: Seconds that the scores of one prompt may take; None waits.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    timeout: float | None = 600.0

    def __post_init__(self) -> None:
        """Import the function, so that a mistake shows before the run."""
        super().__post_init__()
        self._function = self._imported()
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # of some functions that are not written in Python
            return
        try:
            signature.bind([], {}, **self.arguments)
        except TypeError as error:
            given = ", ".join(["responses", "record", *self.arguments])
            problem = f"{self.function}{signature} cannot be called with {given} ({error})"
            raise self.refusal(f"{problem}. Change the function, or 'arguments'") from error

    def __call__(self, responses: list[str], record: dict[str, Any]) -> Given:
        """What the function gives."""
        return self._function(responses, record, **self.arguments)

    def default_name(self) -> str:
        """The function's name."""
        return self.function.rpartition(".")[2]

    def _imported(self) -> Callable[..., Given]:
        module, _, name = self.function.rpartition(".")
        if not module:
            raise self.refusal(f"function is '{self.function}'; use a dotted path, as my_rewards.score")
        # Last, so that no file of the working directory takes the place of an installed package.
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever the module does as it is imported
            why = f"{type(error).__name__}: {error}; looked from {os.getcwd()}, too"
            raise self.refusal(f"{self.function} cannot be imported ({why}). Check 'function'") from error
        if not callable(function):
            raise self.refusal(f"{self.function} is no function, but {type(function).__name__}. Check 'function'")
        return cast(Callable[..., Given], function)
