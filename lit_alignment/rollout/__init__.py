"""Policy optimisation's rollouts: responses that are sampled in training, and what scores them."""

from lit_alignment.rollout.builtin_rewards import (
    ExactMatchReward,
    FormatReward,
    JsonEquality,
    LengthReward,
    RegexMatch,
)
from lit_alignment.rollout.model_reward import ModelReward
from lit_alignment.rollout.python_reward import PythonReward
from lit_alignment.rollout.reasoning_gym import ReasoningGymReward, reasoning_gym_records
from lit_alignment.rollout.reward_pool import RewardPool, Scores
from lit_alignment.rollout.rewards import RewardFunction

__all__ = [
    "ExactMatchReward",
    "FormatReward",
    "JsonEquality",
    "LengthReward",
    "ModelReward",
    "PythonReward",
    "ReasoningGymReward",
    "RegexMatch",
    "RewardFunction",
    "RewardPool",
    "Scores",
    "reasoning_gym_records",
]
