"""From log-probabilities of tokens to those of responses, and to the loss of each pair or response.

N tokens, S responses, T tokens of the longest one, B pairs or responses judged alone
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_alignment.errors import ConfigError
from lit_alignment.losses import preference as losses
from lit_alignment.losses.preference_config import LossConfig

Given = TypeVar("Given")


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities of responses, [B] each.

    Args:
        policy: Summed over a response's own tokens.
        reference: The same under the reference; None without one.
        lengths: Number of tokens.
        first_policy: Summed over as many first tokens as the shorter response of the pair has; for ld_dpo.
        first_reference: The same under the reference.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    first_policy: Tensor | None = None
    first_reference: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """Policy less reference."""
        return self.policy - _given(self.reference)

    @property
    def mean(self) -> Tensor:
        """Mean log-probability of a token."""
        return self.policy / self.lengths

    @property
    def mean_ratio(self) -> Tensor:
        """Mean log-ratio of a token."""
        return self.ratio / self.lengths

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood of a token."""
        return -self.mean

    def weighted_ratio(self, tail_weight: float) -> Tensor:
        """The ratio, with tokens beyond the shorter response's length times `tail_weight`."""
        first = _given(self.first_policy) - _given(self.first_reference)
        return first + tail_weight * (self.ratio - first)


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses to the same prompts.

    Args:
        chosen: The better ones.
        rejected: The others.
        margins: What the records say of how far apart they are, [B].
        baselines: z of the chosen and of the rejected responses of the whole optimizer step, [2]; for kto_pair.
    """

    chosen: ResponseLogps
    rejected: ResponseLogps
    margins: Tensor
    baselines: Tensor | None = None


def responses_of(policy: Tensor, reference: Tensor | None, lengths: Sequence[int], counts: Tensor) -> ResponseLogps:
    """Sums of tokens' log-probabilities by response.

    Args:
        policy: Of each token, in the order of responses, [N].
        reference: The same under the reference.
        lengths: Tokens of each response; they sum to N.
        counts: The same on the device, [S].
    """
    sums = [None if values is None else by_response(values, lengths).sum(1) for values in (policy, reference)]
    return ResponseLogps(_given(sums[0]), sums[1], counts)


def pairs_of(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Sequence[int],
    counts: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor,
    baselines: Tensor | None = None,
) -> Pairs:
    """Both sides of pairs, from log-probabilities of tokens.

    Args:
        policy: Of each token, in the order of responses, [N].
        reference: The same under the reference.
        lengths: Tokens of each response; they sum to N.
        counts: The same on the device, [S].
        chosen: Index of the better response of each pair, [B].
        rejected: Of the other.
        margins: What the records say of how far apart they are, [B].
        baselines: z of both sides over the whole optimizer step, [2].
    """
    tokens = [None if values is None else by_response(values, lengths) for values in (policy, reference)]  # [S, T]
    positions = torch.arange(max(lengths, default=0), device=counts.device)
    first = positions < torch.minimum(counts[chosen], counts[rejected])[:, None]  # [B, T]

    def side(indices: Tensor) -> ResponseLogps:
        rows = [None if each is None else each[indices] for each in tokens]
        sums = [None if each is None else each.sum(1) for each in rows]
        firsts = [None if each is None else (each * first).sum(1) for each in rows]
        return ResponseLogps(_given(sums[0]), sums[1], counts[indices], *firsts)

    return Pairs(side(chosen), side(rejected), margins, baselines)


def by_response(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Values of tokens, [N], as one row a response, padded with 0, [S, T]."""
    if not lengths:
        return values.new_zeros(0, 0)
    return pad_sequence(list(torch.split(values, list(lengths))), batch_first=True)


def pair_loss(config: LossConfig, pairs: Pairs) -> Tensor:
    """The loss of each pair, without its weight, [B]."""
    if config.form.of != "pairs":
        raise ConfigError(f"losses: {config.name} is a loss of responses judged alone, not of pairs.")
    return _ratio_loss(config, pairs) if config.form.needs_reference else _reference_free_loss(config, pairs)


def _ratio_loss(config: LossConfig, pairs: Pairs) -> Tensor:
    """The loss of each pair under a loss that compares the policy with a reference, [B]."""
    setting, beta = config.setting, config.setting("beta")
    chosen, rejected = pairs.chosen.ratio, pairs.rejected.ratio
    match config.name:
        case "nca_pair":
            return losses.nca_pair_loss(chosen, rejected, beta)
        case "bco_pair":
            return losses.bco_pair_loss(chosen, rejected, beta)
        case "sppo_hard":
            return losses.sppo_hard_loss(chosen, rejected, beta)
        case "apo_zero":
            return losses.apo_zero_loss(chosen, rejected, beta)
        case "apo_down":
            return losses.apo_down_loss(chosen, rejected, beta)
        case "cal_dpo":
            return losses.cal_dpo_loss(chosen, rejected, beta)
        case "dpop":
            return losses.dpop_loss(chosen, rejected, beta, setting("penalty"))
        case "mpo":
            bco = losses.bco_pair_loss(chosen, rejected, beta)
            return 0.8 * losses.sigmoid_loss(chosen - rejected, beta) + 0.2 * bco + pairs.chosen.nll
        case "kto_pair":
            z_chosen, z_rejected = _given(pairs.baselines)
            good = torch.ones_like(chosen, dtype=torch.bool)
            both = losses.kto_loss(chosen, good, z_rejected, beta) + losses.kto_loss(rejected, ~good, z_chosen, beta)
            return 0.5 * both  # a mean over responses
        case _:
            return _gap_loss(config, pairs)


def _gap_loss(config: LossConfig, pairs: Pairs) -> Tensor:
    """The same, where only the difference of both responses counts, [B]."""
    setting, beta = config.setting, config.setting("beta")
    chosen, rejected = pairs.chosen, pairs.rejected
    match config.name:
        case "robust":
            return losses.robust_loss(_gap(config, pairs), beta, setting("label_smoothing"))
        case "sigmoid_margin":
            return losses.sigmoid_loss(_gap(config, pairs), beta, offset=pairs.margins)
        case "length_penalty":
            longer = setting("length_weight") * (chosen.lengths - rejected.lengths)
            return losses.sigmoid_loss(_gap(config, pairs), beta, offset=longer)
        case "sigmoid_norm":
            return losses.sigmoid_loss(chosen.mean_ratio - rejected.mean_ratio, beta)
        case "ld_dpo":
            weight = setting("tail_weight")
            return losses.sigmoid_loss(chosen.weighted_ratio(weight) - rejected.weighted_ratio(weight), beta)
        case "hinge":
            return losses.hinge_loss(_gap(config, pairs), beta)
        case "ipo":
            return losses.ipo_loss(chosen.mean_ratio - rejected.mean_ratio, beta)
        case "ipo_sum":
            return losses.ipo_loss(chosen.ratio - rejected.ratio, beta)
        case "exo_pair":
            return losses.exo_pair_loss(_gap(config, pairs), beta, setting("label_smoothing"))
        case "discopop":
            return losses.discopop_loss(_gap(config, pairs), beta, setting("tau"))
        case "ddpo":
            forward = bool(setting("forward_kl"))
            return losses.distilled_preference_loss(chosen.ratio - rejected.ratio, pairs.margins, beta, forward)
        case "rpo":
            loss = losses.sigmoid_loss(_gap(config, pairs), beta, setting("label_smoothing"))
            return loss + setting("nll_weight") * chosen.nll
        case _:
            return losses.sigmoid_loss(_gap(config, pairs), beta, setting("label_smoothing"))


def _reference_free_loss(config: LossConfig, pairs: Pairs) -> Tensor:
    """The loss of each pair under a loss without a reference, [B]."""
    setting, chosen, rejected = config.setting, pairs.chosen, pairs.rejected
    gap = _compared(config, chosen) - _compared(config, rejected)
    match config.name:
        case "hinge_reference_free":
            return losses.hinge_loss(gap, setting("beta"))
        case "slic":
            return (setting("target_margin") - gap).clamp_min(0) - setting("nll_weight") * chosen.policy
        case "cpo":
            loss = losses.sigmoid_loss(gap, setting("beta"), setting("label_smoothing"))
            return loss + setting("nll_weight") * chosen.nll
        case "simpo" | "alphapo":
            loss = losses.sigmoid_loss(gap, setting("beta"), offset=setting("target_margin"))
            return loss + setting("nll_weight") * chosen.nll
        case "orpo":
            return chosen.nll + setting("odds_weight") * losses.odds_ratio_loss(chosen.mean, rejected.mean)
        case "asft":
            return chosen.nll + setting("odds_weight") * losses.absolute_odds_loss(chosen.mean, rejected.mean)
        case _:
            return chosen.nll  # sft


def response_loss(config: LossConfig, responses: ResponseLogps, desirable: Tensor, baseline: Tensor | float) -> Tensor:
    """The loss of each response judged alone, with the weight of its side, [B].

    Args:
        config: The loss.
        responses: Their log-probabilities.
        desirable: Whether each is good, [B].
        baseline: z of the whole optimizer step; apo_zero_unpaired has 0 in its place.
    """
    good, bad = config.setting("desirable_weight"), config.setting("undesirable_weight")
    own = baseline if config.form.baseline is not None else 0.0
    loss = losses.kto_loss(responses.ratio, desirable, own, config.setting("beta"))
    return loss * torch.where(desirable, good, bad).to(loss)


def rewards(configs: Sequence[LossConfig], responses: ResponseLogps) -> Tensor:
    """The implicit reward of each response, without gradient, [B].

    beta times the ratio, summed over tokens, under the first loss that has a reference; without any under the first
    loss, beta (or 1) times what it compares.
    """
    config = next((each for each in configs if each.form.needs_reference), configs[0])
    beta = config.setting("beta") if "beta" in config.form.reads else 1.0
    compared = responses.ratio if config.form.needs_reference else _compared(config, responses)
    return (beta * compared).detach()


def _compared(config: LossConfig, responses: ResponseLogps) -> Tensor:
    """What a loss without a reference compares, [B]."""
    if config.name == "alphapo":
        return losses.alpha_reward(responses.mean, config.setting("power"))
    return responses.mean if config.form.compares == "means" else responses.policy


def _gap(config: LossConfig, pairs: Pairs) -> Tensor:
    """Chosen less rejected ratio, or what another divergence makes of them, [B]."""
    divergence, alpha = config.divergence or "reverse_kl", config.setting("divergence_alpha")
    sides = (pairs.chosen, pairs.rejected)
    chosen, rejected = (losses.divergence_ratio(side.ratio, divergence, alpha) for side in sides)
    return chosen - rejected


def _given(value: Given | None) -> Given:
    if value is None:
        raise TypeError("a log-probability that the loss needs was not computed.")
    return value
