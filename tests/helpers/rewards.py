"""Reward functions of the tests."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lit_alignment.rollout.rewards import RewardFunction


@dataclass(kw_only=True, eq=False)
class VowelReward(RewardFunction):
    """Share of vowels, which nearly all responses of a random model differ in."""

    inline: ClassVar[bool] = True

    def __call__(self, responses: list[str], record: dict[str, Any]) -> list[float | None]:
        return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in responses]
