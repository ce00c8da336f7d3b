"""The score of a reward model as a reward."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lit_alignment.errors import present
from lit_alignment.generation.reward_scorer import RewardScorer
from lit_alignment.rollout.rewards import RewardFunction, ScoreList, prompt_messages


@dataclass(kw_only=True, eq=False)
class ModelReward(RewardFunction):
    """The raw score that a reward model gives the record's prompt with the response behind it.

    Args:
        path: The model's folder, as a RewardModule exports it, or its name on the hub.
    """

    inline: ClassVar[bool] = True
    path: str
    _scorer: RewardScorer | None = field(default=None, init=False, repr=False)

    def start(self, device: torch.device) -> None:
        """Load the model onto the device.

        Raises:
            ConfigError: If it cannot be loaded, or is no reward model.
        """
        self._scorer = RewardScorer(self.path)
        self._scorer.model.to(device)

    def __call__(self, responses: list[str], record: dict[str, Any]) -> ScoreList:
        """The score of each, as it is."""
        prompt = prompt_messages(record)
        scorer = present(self._scorer, f"the model of {self.name}")
        return [*scorer([[*prompt, {"role": "assistant", "content": response}] for response in responses])]

    def close(self) -> None:
        """Free the model's memory."""
        self._scorer = None
