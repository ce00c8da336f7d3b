"""What is logged of preference optimisation: means over pairs, or over responses judged alone.

N tokens, S responses, P pairs
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_alignment.losses.pairs import Pairs, ResponseLogps, by_response

SIDES = (("chosen", "rejected"), ("desirable", "undesirable"))  # of pairs, and of responses judged alone
# Of pairs, for the correlation of margins with the difference in length.
MOMENTS = ("margin^2", "longer", "longer^2", "margin*longer")


def value_names(of_responses: bool) -> list[str]:
    """What is averaged, by name.

    Args:
        of_responses: Whether responses are judged alone.
    """
    sides = SIDES[of_responses]
    own = [f"{side}_{what}" for side in sides for what in ("reward", "logp", "length")]
    return ["loss", "chat_loss", *own, "kl", *(["desirable"] if of_responses else ["accuracy", "margin", *MOMENTS])]


def pair_values(chosen: Tensor, rejected: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """What is averaged over pairs, [P] each. Of equal rewards half counts as right.

    Args:
        chosen: Rewards of the chosen responses, [P].
        rejected: Of the others.
        pairs: Their log-probabilities and lengths.
    """
    margin, longer = chosen - rejected, (pairs.chosen.lengths - pairs.rejected.lengths).to(chosen)
    return {
        **_side_values("chosen", chosen, pairs.chosen),
        **_side_values("rejected", rejected, pairs.rejected),
        "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "margin": margin,
        "margin^2": margin.square(),
        "longer": longer,
        "longer^2": longer.square(),
        "margin*longer": margin * longer,
    }


def response_values(
    rewards: Tensor, responses: ResponseLogps, desirable: Tensor, undesirable: Tensor
) -> dict[str, Tensor]:
    """What is averaged over responses judged alone, by side.

    Args:
        rewards: [S].
        responses: Their log-probabilities and lengths.
        desirable: Indices of the good ones, [G].
        undesirable: Of the others, [S - G].
    """
    values = {"desirable": torch.zeros_like(rewards).index_fill(0, desirable, 1)}
    for name, side in zip(SIDES[1], (desirable, undesirable), strict=True):
        own = ResponseLogps(responses.policy[side], None, responses.lengths[side])
        values |= _side_values(name, rewards[side], own)
    return values


def _side_values(name: str, rewards: Tensor, responses: ResponseLogps) -> dict[str, Tensor]:
    found = {"reward": rewards, "logp": responses.policy, "length": responses.lengths}
    return {f"{name}_{what}": value for what, value in found.items()}


def k3_estimate(policy: Tensor, reference: Tensor, lengths: Sequence[int]) -> Tensor:
    """An estimate of KL(policy || reference) over each response, [S]: the sum over tokens of exp(-d) - 1 + d.

    It is unbiased for responses of the policy; of others it says how far the policy has moved on them.

    Args:
        policy: Log-probabilities, [N].
        reference: The same under the reference.
        lengths: Tokens of each response.

    Source: Schulman 2020, "Approximating KL divergence", k3.
    """
    difference = policy.detach() - reference
    return by_response(torch.expm1(-difference) + difference, lengths).sum(1)


def logged_means(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is logged of means: the moments become `length_correlation`, and both sides' rewards a margin.

    Args:
        values: Of `pair_values` or `response_values`.
    """
    found = {name: value for name, value in values.items() if name not in MOMENTS}
    if "longer" in values:
        margin, longer = values["margin"], values["longer"]
        variances = (values["margin^2"] - margin**2) * (values["longer^2"] - longer**2)
        if float(variances) > 0:
            found["length_correlation"] = (values["margin*longer"] - margin * longer) / variances.sqrt()
    elif {"desirable_reward", "undesirable_reward"} <= values.keys():
        found["margin"] = values["desirable_reward"] - values["undesirable_reward"]
    return found
