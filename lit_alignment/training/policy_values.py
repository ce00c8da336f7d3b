"""What is logged of sampled responses and of their tokens."""

import math
from collections.abc import Sequence

from torch import Tensor

from lit_alignment.data.rollout import Answer, Group
from lit_alignment.losses.policy import PolicyLoss

OF_ANSWERS = ("length", "truncated", "unscored")
OF_STEPS = ("no_variance",)
OF_TOKENS = ("ratio", "clipped_low", "clipped_high", "kl", "entropy")


def reward_names(functions: Sequence[str]) -> dict[str, str | None]:
    """Names under which rewards are logged, with those of their functions; None is the weighted sum.

    Args:
        functions: Names of all reward functions; a single one's scores are the reward itself.
    """
    return {"reward": None} | ({f"reward_{name}": name for name in functions} if len(functions) > 1 else {})


def names_of_values(functions: Sequence[str]) -> list[str]:
    """Names of all that is logged in training.

    Args:
        functions: Names of the reward functions.
    """
    rewards = reward_names(functions)
    return [*rewards, *(f"{name}_deviation" for name in rewards), *OF_ANSWERS, *OF_STEPS, *OF_TOKENS]


def answer_values(answers: Sequence[Answer], functions: Sequence[str]) -> dict[str, list[float]]:
    """Values of responses by name; rewards of those that have them.

    Args:
        answers: The responses.
        functions: Names of the reward functions.
    """
    values: dict[str, list[float]] = {}
    for name, function in reward_names(functions).items():
        of_all = [answer.reward if function is None else answer.rewards[function] for answer in answers]
        values[name] = [value for value in of_all if not math.isnan(value)]
    values["length"] = [len(answer.token_ids) for answer in answers]
    values["truncated"] = [answer.truncated for answer in answers]
    values["unscored"] = [math.isnan(answer.reward) for answer in answers]
    return values


def best_and_worst(groups: Sequence[Group]) -> list[tuple[str, int, Answer]]:
    """The responses of the highest and the lowest reward, each with a title and the index of its record.

    Of equal ones it is the first, and if all are equal this alone; there is none without a reward.

    Args:
        groups: Of a rollout.
    """
    scored = [(group.index, answer) for group in groups for answer in group.answers if not math.isnan(answer.reward)]
    if not scored:
        return []
    best, worst = max(scored, key=lambda each: each[1].reward), min(scored, key=lambda each: each[1].reward)
    if best[1].reward == worst[1].reward:
        return [("best and worst", *best)]
    return [("best", *best), ("worst", *worst)]


def token_values(found: PolicyLoss, policy: Tensor) -> dict[str, Tensor]:
    """Values of each token, [N]; minus the log-probability of a sampled token is an estimate of the entropy.

    Args:
        found: The loss of a micro-batch.
        policy: Log-probabilities, [N].
    """
    values = {"ratio": found.ratios, "clipped_low": found.clipped_low, "clipped_high": found.clipped_high}
    return values | {"entropy": -policy} | ({} if found.kl is None else {"kl": found.kl})
