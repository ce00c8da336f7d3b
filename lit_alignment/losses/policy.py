"""Policy optimisation from sampled responses: advantages of rewards, and the loss of tokens.

N tokens, B responses, G groups of responses to one prompt, R ranks

A response whose reward is NaN was not scored, and is as if it had not been drawn: no mean, deviation or denominator
counts it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_alignment.losses.chunks import wide
from lit_alignment.losses.policy_config import AdvantageForm, PolicyLossConfig

DEVIATION_OFFSET = 1e-4  # what advantages are divided by is never below it
LARGEST_LOG_RATIO = 20.0  # from here on ratios grow on a straight line, so that products of two are finite in fp32


def advantages(
    rewards: Tensor, groups: Sequence[int], form: AdvantageForm, *, deviation: Tensor | float | None = None
) -> Tensor:
    """How much better each response is than its group, [B]; exactly 0 where all of a group are equal.

    (r - m) / (s + 1e-4) with the group's mean m and deviation s (n - 1) for `group`, with s of all scored rewards of
    the optimizer step for `batch`; r - m for `none`; r less the mean of the others for `leave_one_out`. A response
    that is alone in its group, or not scored, has 0.

    Args:
        rewards: NaN where a response was not scored, [B]; groups stand one after another.
        groups: Number of responses in each, G of them; they sum to B.
        form: One of the above.
        deviation: Of all scored rewards of the optimizer step, on all ranks; for `batch`, see `step_deviation`.

    Raises:
        ValueError: If the groups are not those of the rewards, or `batch` lacks its deviation.

    Source: group: Shao et al. 2024 (arXiv:2402.03300); none: Liu et al. 2025 (arXiv:2503.20783); leave_one_out:
    Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    if sum(groups) != len(rewards):
        raise ValueError(f"groups of {sum(groups)} responses in all do not fit {len(rewards)} rewards.")
    rewards = wide(rewards)
    scored = ~rewards.isnan()
    index = torch.tensor([group for group, size in enumerate(groups) for _ in range(size)], dtype=torch.long)
    index = index.to(rewards.device)  # [B]
    counts = _sums(scored.to(rewards.dtype), index, len(groups))  # [G]
    # From the lowest of the group on, or the mean of equal rewards would not be the reward to the bit.
    highest = rewards.masked_fill(~scored, torch.inf)
    lowest = rewards.new_full((len(groups),), torch.inf).scatter_reduce(0, index, highest, "amin")
    above = torch.where(scored, rewards - lowest[index], 0.0)
    means = _sums(above, index, len(groups)) / counts.clamp_min(1)
    centered = torch.where(scored, above - means[index], 0.0)
    match form:
        case "group":
            spread = _sums(centered.square(), index, len(groups)) / (counts - 1).clamp_min(1)
            return centered / (spread.sqrt()[index] + DEVIATION_OFFSET)
        case "batch":
            if deviation is None:
                raise ValueError("the deviation of all rewards of the optimizer step is missing.")
            return centered / (deviation + DEVIATION_OFFSET)
        case "leave_one_out":
            return centered * (counts / (counts - 1).clamp_min(1))[index]
        case _:
            return centered


def reward_moments(rewards: Tensor) -> Tensor:
    """Number of the scored rewards, their mean, and their summed squared distance from it, fp64, [3]."""
    scored, values = ~rewards.isnan(), rewards.double()
    count = scored.sum().double()
    mean = values.masked_fill(~scored, 0).sum() / count.clamp_min(1)
    return torch.stack([count, mean, (values - mean).masked_fill(~scored, 0).square().sum()])


def step_deviation(moments: Tensor) -> Tensor:
    """Deviation (n - 1) of the scored rewards of all ranks, fp64 scalar; 0 for less than two.

    Args:
        moments: `reward_moments` of each rank, or of any other parts of the step, [R, 3].
    """
    counts, means, squares = moments.double().unbind(-1)
    mean = (counts * means).sum() / counts.sum().clamp_min(1)
    total = (squares + counts * (means - mean).square()).sum()  # Chan et al. 1979: no difference of large sums
    return (total / (counts.sum() - 1).clamp_min(1)).sqrt()


def groups_without_variance(rewards: Tensor, groups: Sequence[int]) -> Tensor:
    """Whether all scored responses of a group have one reward, so that none of it has a gradient, [G]."""
    of_groups = [part.tolist() for part in torch.split(rewards, list(groups))]
    level = [len({reward for reward in own if not math.isnan(reward)}) < 2 for own in of_groups]
    return torch.tensor(level, device=rewards.device)


@dataclass  # not frozen: batches carry it, and Lightning copies these field by field
class WindowCounts:
    """What the losses of an optimizer step are divided by: sums over all its micro-batches and ranks.

    Args:
        responses: Responses that count: scored, and not left out since they are truncated.
        scored: Scored responses.
        tokens: Tokens of the responses that count.
        max_length: Most tokens that a response can have; for `max_length`.
    """

    responses: int = 0
    scored: int = 0
    tokens: int = 0
    max_length: int = 0

    def __add__(self, other: "WindowCounts") -> "WindowCounts":
        return WindowCounts(
            self.responses + other.responses,
            self.scored + other.scored,
            self.tokens + other.tokens,
            max(self.max_length, other.max_length),
        )


def count_responses(
    config: PolicyLossConfig,
    lengths: Sequence[int],
    truncated: Sequence[bool],
    scored: Sequence[bool],
    max_length: int = 0,
) -> WindowCounts:
    """Counts of some responses of an optimizer step, which add up to those of the step.

    Args:
        config: The loss.
        lengths: Number of tokens of each response.
        truncated: Whether it reached the limit of tokens.
        scored: Whether it has a reward.
        max_length: Most tokens that a response can have.
    """
    of_all = zip(lengths, truncated, scored, strict=True)
    counted = [length for length, cut, has in of_all if has and not (cut and config.mask_truncated)]
    return WindowCounts(len(counted), sum(map(bool, scored)), sum(counted), max_length)


@dataclass(frozen=True)
class PolicyInputs:
    """What the loss of a micro-batch is made of; tokens are in the order of responses.

    Args:
        policy: Log-probability of each token under the policy, with gradient, [N].
        lengths: Number of tokens of each response, [B].
        advantages: Of each response, [B].
        truncated: Whether each reached the limit of tokens, [B].
        scored: Whether each has a reward, [B].
        old: Log-probabilities under the policy as it was when it sampled, [N]; None where that is the policy itself.
        sampler: What the sampler says that they were, [N].
        reference: Under the reference, [N].
    """

    policy: Tensor
    lengths: Tensor
    advantages: Tensor
    truncated: Tensor
    scored: Tensor
    old: Tensor | None = None
    sampler: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a micro-batch, and without gradient what it came from.

    Args:
        loss: Share of the micro-batch in the loss of the optimizer step, a scalar with gradient.
        responses: Summed losses of the tokens of each response, 0 where it does not count, [B].
        counts: Whether each token counts, [N].
        ratios: Policy to old policy of each token, or of its response, [N].
        clipped_low: Whether the ratio is so low that the token has no gradient, [N].
        clipped_high: The same at the upper end; in cispo, whether the cap is the weight.
        kl: k3 estimate of the KL divergence from the reference, [N]; None without a reference.
        corrections: Weight of each token for the sampler's sake, [N]; None without a correction.
    """

    loss: Tensor
    responses: Tensor
    counts: Tensor
    ratios: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor | None
    corrections: Tensor | None


def policy_loss(config: PolicyLossConfig, inputs: PolicyInputs, counts: WindowCounts) -> PolicyLoss:
    """The share of a micro-batch in the loss of its optimizer step; shares add up to that, however it is split.

    Gradients go through the policy's log-probabilities alone.

    Args:
        config: The loss.
        inputs: The micro-batch.
        counts: Of the whole optimizer step.

    Raises:
        ValueError: If log-probabilities or counts that the loss needs are missing.

    Source: the papers of `PolicyLossConfig`'s names; k3: Schulman 2020; its correction: DeepSeek-AI 2025
    (arXiv:2512.02556); truncated corrections: Yao et al. 2025, masked ones: Liu et al. 2025. The loss of a step is one
    mean over all its responses or tokens here, not a mean over micro-batches of their means.
    """
    policy = wide(inputs.policy)
    index = _index(inputs.lengths, len(policy))
    old = (policy if inputs.old is None else inputs.old.to(policy)).detach()
    log_ratios = _of_level(config, policy - old, index, inputs.lengths)  # [N]
    ratios = _bounded_exp(log_ratios)
    token_advantages = inputs.advantages.detach().to(policy)[index]
    losses = token_objective(config, policy, ratios, token_advantages)
    corrections = None
    if config.correction is not None:
        if inputs.sampler is None:
            raise ValueError(f"{config.correction} needs the sampler's log-probabilities.")
        corrections = correction_weights(config, old - inputs.sampler.to(policy), index, len(inputs.lengths))
        losses = losses * corrections
    kl = None
    if config.needs_reference:
        if inputs.reference is None:
            raise ValueError("kl_weight needs the log-probabilities under the reference.")
        kl = k3(policy, inputs.reference.to(policy))
        losses = losses + config.kl_weight * (kl * ratios if config.kl_bias_correction else kl)
    kept = inputs.scored & ~inputs.truncated if config.mask_truncated else inputs.scored
    responses = torch.where(kept, _sums(losses, index, len(inputs.lengths)), 0.0)
    low, high = clipped(config, ratios.detach(), token_advantages)
    return PolicyLoss(
        aggregate(config, responses, inputs.lengths, counts),
        responses.detach(),
        kept[index],
        ratios.detach(),
        low,
        high,
        None if kl is None else kl.detach(),
        corrections,
    )


def token_objective(config: PolicyLossConfig, policy: Tensor, ratios: Tensor, advantages: Tensor) -> Tensor:
    """Loss of each token before corrections and KL divergence, [N].

    clip: -min(min(ratio, delta) A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A); cispo: -min(ratio, cap) A log pi,
    without gradient through the ratio; sapo: -A (4 / tau) sigmoid(tau (ratio - 1)).

    Args:
        config: The loss.
        policy: Log-probabilities, [N].
        ratios: [N].
        advantages: A, [N].
    """
    setting = config.setting
    match config.form.objective:
        case "clip":
            near = ratios.clamp(1 - setting("epsilon_low"), 1 + setting("epsilon_high"))
            return -torch.minimum(ratios.clamp_max(setting("delta")) * advantages, near * advantages)
        case "cispo":
            return -ratios.detach().clamp_max(setting("epsilon_high")) * advantages * policy
        case "sapo":
            tau = torch.full_like(ratios, setting("tau")).masked_fill(advantages <= 0, setting("tau_negative"))
            return -advantages * (4 / tau) * (tau * (ratios - 1)).sigmoid()


def clipped(config: PolicyLossConfig, ratios: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each ratio is clipped at the lower end, and at the upper, [N] each; sapo clips nothing."""
    setting = config.setting
    match config.form.objective:
        case "clip":
            low = (ratios < 1 - setting("epsilon_low")) & (advantages < 0)
            return low, (ratios > 1 + setting("epsilon_high")) & (advantages > 0)
        case "cispo":
            return torch.zeros_like(ratios, dtype=torch.bool), ratios > setting("epsilon_high")
        case "sapo":
            return (torch.zeros_like(ratios, dtype=torch.bool),) * 2


def correction_weights(config: PolicyLossConfig, log_ratios: Tensor, index: Tensor, num_responses: int) -> Tensor:
    """Importance weight of each token for a sampler that is not the trainer, without gradient, [N].

    Args:
        config: The loss.
        log_ratios: log old - log sampler of each token, [N].
        index: Response of each token, [N].
        num_responses: B.
    """
    log_ratios, largest = log_ratios.detach(), math.log(config.cap)
    match config.correction:
        case "sequence_mask":
            products = _sums(log_ratios, index, num_responses)
            return torch.where(products > largest, 0.0, products.exp())[index]
        case _:
            return log_ratios.clamp_max(largest).exp()


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """Estimate exp(d) - d - 1 >= 0 of the KL divergence from the reference, d = log reference - log policy, [N]."""
    difference = reference.detach() - policy
    capped = difference.clamp_max(LARGEST_LOG_RATIO)
    # expm1: of two close log-probabilities the sum would keep few digits. The line beyond is that of `_bounded_exp`.
    return torch.expm1(capped) + capped.exp() * (difference - capped) - difference


def aggregate(config: PolicyLossConfig, responses: Tensor, lengths: Tensor, counts: WindowCounts) -> Tensor:
    """One number from the summed losses of responses, [B], of which those that do not count are 0.

    Args:
        config: The loss.
        responses: [B].
        lengths: Number of tokens of each, [B].
        counts: Of the whole optimizer step.
    """
    match config.form.aggregate:
        case "sequence_mean":
            return (responses / lengths.clamp_min(1)).sum() / max(1, counts.responses)
        case "token_mean":
            return responses.sum() / max(1, counts.tokens)
        case "sequence_sum":
            return responses.sum() / max(1, counts.responses)
        case "max_length":
            if counts.max_length < 1:
                raise ValueError("max_length needs the most tokens that a response can have.")
            return responses.sum() / (max(1, counts.scored) * counts.max_length)


def _of_level(config: PolicyLossConfig, log_ratios: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    """Log-ratios of tokens, or at each token the mean of its response's, [N]."""
    if config.form.ratio == "token":
        return log_ratios
    return (_sums(log_ratios, index, len(lengths)) / lengths.clamp_min(1))[index]


def _bounded_exp(values: Tensor) -> Tensor:
    """Exponential that goes on as a straight line: finite, and the gradient still points the right way."""
    capped = values.clamp_max(LARGEST_LOG_RATIO)
    return capped.exp() * (1 + (values - capped))


def _index(lengths: Tensor, number: int) -> Tensor:
    """Which segment each of the values belongs to, [number]."""
    values = torch.arange(number, device=lengths.device)
    return torch.searchsorted(lengths.cumsum(0), values, right=True)


def _sums(values: Tensor, index: Tensor, number: int) -> Tensor:
    """Sum of each segment's values, [number]."""
    return values.new_zeros(number).index_add(0, index, values)
