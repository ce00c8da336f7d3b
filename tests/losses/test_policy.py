"""Worked cases of policy optimisation, a slow loop over every combination, and what holds for all of them."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from lit_alignment.errors import ConfigError
from lit_alignment.losses.policy import (
    PolicyInputs,
    WindowCounts,
    advantages,
    count_responses,
    groups_without_variance,
    policy_loss,
    reward_moments,
    step_deviation,
)
from lit_alignment.losses.policy_config import (
    PRESETS,
    AdvantageForm,
    Aggregate,
    Correction,
    Objective,
    PolicyForm,
    PolicyLossConfig,
    RatioLevel,
)

VECTORS = json.loads((Path(__file__).parent / "policy_vectors.json").read_text())
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
# What the cases call our settings; a form or level that the loss's name already says must be the name's own.
NAMES = {"kl_beta": "kl_weight", "vllm_correction": "correction", "vllm_clip_max": "correction_cap"}
NAN = float("nan")


def config_of(case):
    settings = {}
    for name, value in case["hyperparameters"].items():
        if name == "importance_sampling_level":
            assert PRESETS[case["loss"]].ratio == value
        elif name in ("scale_rewards", "advantage"):
            settings["advantage"] = {"rloo": "leave_one_out"}.get(value, value)
        elif name != "loss_type":
            settings[NAMES.get(name, name)] = value
    if not settings.get("kl_weight"):
        settings.pop("kl_bias_correction", None)
    if PRESETS[case["loss"]].objective == "clip":  # the cases' own usual values
        settings = {"epsilon_low": 0.2, "epsilon_high": 0.2, **settings}
    return PolicyLossConfig(case["loss"], **settings)


def inputs_of(answers, found, dtype):
    def tokens(name):
        return torch.tensor([value for answer in answers for value in answer[f"{name}token_logps"]], dtype=dtype)

    return PolicyInputs(
        tokens("").requires_grad_(),
        torch.tensor([len(answer["token_logps"]) for answer in answers]),
        found,
        torch.tensor([answer["truncated"] for answer in answers]),
        torch.ones(len(answers), dtype=torch.bool),
        tokens("old_"),
        tokens("sampler_"),
        tokens("ref_"),
    )


def counts_of(config, inputs, max_length=0):
    return count_responses(
        config, inputs.lengths.tolist(), inputs.truncated.tolist(), inputs.scored.tolist(), max_length
    )


def close(found, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["id"])
def test_worked_case_of_groups(case, dtype, tolerance):
    config, expected, batch = config_of(case), case["expected"], VECTORS["group_batches"][case["batch"]]
    answers = batch["answers"]
    rewards = torch.tensor([answer["reward"] for answer in answers], dtype=dtype)
    groups = [batch["group_size"]] * (len(answers) // batch["group_size"])
    deviation = step_deviation(reward_moments(rewards)[None])
    found = advantages(rewards, groups, config.form.advantage, deviation=deviation)
    close(found, expected["advantages"], tolerance)
    inputs = inputs_of(answers, found, dtype)
    loss = policy_loss(config, inputs, counts_of(config, inputs, batch["max_length"]))
    assert loss.loss.dtype == dtype
    close(loss.loss, expected["loss"], tolerance)
    close(loss.responses, expected["loss_per_answer_sum"], tolerance)


# Combinations, against a loop.


def a_step(seed=0, dtype=torch.float64):
    """Eight responses of which two are truncated and one is not scored."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 1, 5, 2, 4, 3, 1, 6])

    def noise(scale):
        return scale * torch.randn(int(lengths.sum()), generator=generator, dtype=dtype)

    policy = -noise(1.0).abs()
    scored = torch.tensor([True] * 5 + [False] + [True] * 2)
    return PolicyInputs(
        policy.requires_grad_(),
        lengths,
        torch.randn(8, generator=generator, dtype=dtype) * scored,
        torch.tensor([False, True, False, False, True, False, False, False]),
        scored,
        policy.detach() + noise(0.3),
        policy.detach() + noise(0.3),
        policy.detach() + noise(0.5),
    )


def slow_loss(config, inputs, max_length):
    """The loss of a whole step, token by token."""
    form, total, kept, kept_tokens, scored = config.form, 0.0, 0, 0, 0
    parts = [None if t is None else t.split(inputs.lengths.tolist()) for t in tokens_of(inputs)]
    for b, length in enumerate(inputs.lengths.tolist()):
        if not inputs.scored[b]:
            continue
        scored += 1
        if config.mask_truncated and inputs.truncated[b]:
            continue
        kept, kept_tokens = kept + 1, kept_tokens + length
        policy, old, sampler, reference = (part[b] for part in parts)
        advantage, product = inputs.advantages[b].item(), math.exp((old - sampler).sum())
        mean_ratio = ((policy - old).sum() / length).exp()
        response = 0.0
        for t in range(length):
            ratio = (policy[t] - old[t]).exp() if form.ratio == "token" else mean_ratio
            value = slow_objective(config, policy[t], ratio, advantage)
            if config.correction == "token_truncate":
                value = value * min(math.exp(old[t] - sampler[t]), config.cap)
            elif config.correction == "sequence_mask":
                value = value * (product if product <= config.cap else 0.0)
            d = reference[t] - policy[t]
            kl = d.exp() - d - 1
            response = response + value + config.kl_weight * kl * (ratio if config.kl_bias_correction else 1)
        total = total + (response / length if form.aggregate == "sequence_mean" else response)
    denominator = {"token_mean": kept_tokens, "max_length": scored * max_length}.get(form.aggregate, kept)
    return total / denominator


def tokens_of(inputs):
    return inputs.policy, inputs.old, inputs.sampler, inputs.reference


def slow_objective(config, logp, ratio, advantage):
    objective = config.form.objective
    if objective == "sapo":
        tau = config.setting("tau") if advantage > 0 else config.setting("tau_negative")
        return -advantage * 4 / tau / (1 + (-tau * (ratio - 1)).exp())
    if objective == "cispo":
        return -min(ratio.item(), config.setting("epsilon_high")) * advantage * logp
    low, high = 1 - config.setting("epsilon_low"), 1 + config.setting("epsilon_high")
    inner = ratio if low <= ratio <= high else torch.tensor(low if ratio < low else high, dtype=torch.float64)
    outer = ratio if ratio <= config.setting("delta") else torch.tensor(config.setting("delta"), dtype=torch.float64)
    return -(outer * advantage if outer * advantage < inner * advantage else inner * advantage)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("aggregate", get_args(Aggregate))
@pytest.mark.parametrize("ratio", get_args(RatioLevel))
@pytest.mark.parametrize("objective", get_args(Objective))
def test_loss_and_gradient_of_every_combination_equal_a_slow_loop(objective, ratio, aggregate, mask_truncated):
    own = {"clip": {"epsilon_high": 0.28, "delta": 1.5}, "cispo": {"epsilon_high": 1.2}, "sapo": {"tau": 0.9}}
    choices = {"objective": objective, "ratio": ratio, "aggregate": aggregate, **own[objective]}
    for correction, kl in itertools.product((None, *get_args(Correction)), ({}, {"kl_bias_correction": True}, None)):
        settings = {} if kl is None else {"kl_weight": 0.3, **kl}
        settings |= {} if correction is None else {"correction": correction, "correction_cap": 1.1}
        config = PolicyLossConfig(**choices, **settings, mask_truncated=mask_truncated)
        inputs = a_step()
        loss = policy_loss(config, inputs, counts_of(config, inputs, 7)).loss
        expected = slow_loss(config, inputs, 7)
        close(loss, expected.item(), 1e-12)
        gradients = [torch.autograd.grad(each, inputs.policy)[0] for each in (loss, expected)]
        close(*gradients, 1e-12)


def part_of(inputs, responses):
    """The micro-batch of some of the responses."""
    ends = inputs.lengths.cumsum(0)
    tokens = torch.cat([torch.arange(ends[b] - inputs.lengths[b], ends[b]) for b in responses])
    by_token = {
        name: value[tokens]
        for name, value in zip(("policy", "old", "sampler", "reference"), tokens_of(inputs), strict=True)
    }
    by_response = {name: getattr(inputs, name)[responses] for name in ("lengths", "advantages", "truncated", "scored")}
    return replace(inputs, **by_token, **by_response)


@pytest.mark.parametrize("name", PRESETS)
def test_shares_of_micro_batches_add_up_however_the_step_is_split(name):
    config = PolicyLossConfig(name, kl_weight=0.1, correction="sequence_mask", mask_truncated=True)
    inputs = a_step()
    whole = policy_loss(config, inputs, counts_of(config, inputs, 7)).loss
    (expected,) = torch.autograd.grad(whole, inputs.policy)
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[7], [5], [1, 4], [0, 2, 6], [3]]):
        parts = [part_of(inputs, responses) for responses in split]
        counts = sum((counts_of(config, part, 7) for part in parts), WindowCounts())
        shares = torch.stack([policy_loss(config, part, counts).loss for part in parts])
        close(shares.sum(), whole.item(), 1e-12)
        close(torch.autograd.grad(shares.sum(), inputs.policy)[0], expected, 1e-12)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("aggregate", get_args(Aggregate))
@pytest.mark.parametrize("form", get_args(AdvantageForm))
def test_response_without_a_score_is_as_if_it_had_not_been_drawn(form, aggregate, mask_truncated):
    config = PolicyLossConfig(aggregate=aggregate, advantage=form, kl_weight=0.1, mask_truncated=mask_truncated)
    step, drawn = a_step(), [0, 1, 2, 3, 4, 6, 7]
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 1.0, NAN, 0.0, -1.0], dtype=torch.float64)

    def loss(inputs, rewards, groups):
        deviation = step_deviation(reward_moments(rewards)[None])
        found = advantages(rewards, groups, form, deviation=deviation)
        inputs = replace(inputs, advantages=found, scored=~rewards.isnan())
        made = policy_loss(config, inputs, counts_of(config, inputs, 7)).loss
        return found, made, torch.autograd.grad(made, step.policy)[0]

    with_it, without = loss(step, rewards, [3, 3, 2]), loss(part_of(step, drawn), rewards[drawn], [3, 2, 2])
    close(with_it[0][drawn], without[0], 1e-14)
    assert with_it[0][5] == 0
    for one, other in zip(with_it[1:], without[1:], strict=True):
        close(one, other, 1e-14)


# Advantages.


def test_advantages_worked_by_hand():
    """Rewards 1, 0, 0.5: mean 0.5, deviation 0.5; of all five, with 4 and 2, the deviation is 1.6125..."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 4.0, 2.0], dtype=torch.float64)
    close(advantages(rewards, [3, 2], "none"), [0.5, -0.5, 0.0, 1.0, -1.0], 1e-15)
    divided = [0.5 / 0.5001, -0.5 / 0.5001, 0.0, 1 / (2**0.5 + 1e-4), -1 / (2**0.5 + 1e-4)]
    close(advantages(rewards, [3, 2], "group"), divided, 1e-14)
    close(advantages(rewards, [3, 2], "leave_one_out"), [0.75, -0.75, 0.0, 2.0, -2.0], 1e-15)
    deviation = step_deviation(reward_moments(rewards)[None])
    close(deviation, rewards.std().item(), 1e-14)
    close(
        advantages(rewards, [3, 2], "batch", deviation=deviation),
        torch.tensor([0.5, -0.5, 0.0, 1.0, -1.0]).double() / (rewards.std() + 1e-4),
        1e-14,
    )


@pytest.mark.parametrize("form", get_args(AdvantageForm))
def test_group_without_variance_has_no_advantage_at_all(form):
    """Not even one of rounding: the mean of three times 0.1 is not 0.1."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, NAN, 0.3, NAN, NAN, 1e7, 1e7], dtype=torch.float64)
    groups = [3, 2, 1, 2, 2]
    assert advantages(rewards, groups, form, deviation=0.5).tolist() == [0.0] * 10
    assert groups_without_variance(rewards, groups).all()
    assert groups_without_variance(torch.tensor([1.0, NAN, 2.0, 3.0, 3.0]), [3, 2]).tolist() == [False, True]
    assert advantages(torch.zeros(0), [], form, deviation=0.0).shape == (0,)


def test_deviation_of_ranks_is_that_of_all_their_rewards():
    rewards = 1e6 + torch.randn(23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[[3, 11]] = NAN
    ranks = [reward_moments(part) for part in (rewards[:5], rewards[5:6], rewards[:0], rewards[6:])]
    expected = rewards[~rewards.isnan()].std().item()
    assert step_deviation(torch.stack(ranks)).item() == pytest.approx(
        expected, rel=1e-9
    )  # of sums of squares nothing would be left
    for few in ([], [2.0], [NAN, 3.0]):
        assert step_deviation(reward_moments(torch.tensor(few))[None]).item() == 0


def test_advantages_need_groups_that_fit_and_the_deviation_of_the_step():
    with pytest.raises(ValueError, match="groups of 3 responses in all do not fit 4 rewards"):
        advantages(torch.zeros(4), [2, 1], "group")
    with pytest.raises(ValueError, match="deviation of all rewards"):
        advantages(torch.zeros(4), [2, 2], "batch")


# Gradients, masks, corrections.


@pytest.mark.parametrize("name", PRESETS)
def test_gradient_goes_through_the_policy_alone(name):
    config = PolicyLossConfig(name, kl_weight=0.1, kl_bias_correction=True, correction="token_truncate")
    inputs = a_step()
    others = [inputs.advantages, inputs.old, inputs.sampler, inputs.reference]
    for each in others:
        each.requires_grad_()
    loss = policy_loss(config, inputs, counts_of(config, inputs, 7))
    assert not any(each.requires_grad for each in (loss.responses, loss.ratios, loss.kl, loss.corrections))
    gradients = torch.autograd.grad(loss.loss, [inputs.policy, *others], allow_unused=True)
    assert (gradients[0] != 0).any() and gradients[1:] == (None,) * 4


@pytest.mark.parametrize("name", PRESETS)
def test_on_its_own_samples_every_objective_is_the_policy_gradient(name):
    """Ratio 1 to the bit, and -A times the gradient of log pi, over the same denominators."""
    config, inputs = PolicyLossConfig(name), replace(a_step(dtype=torch.float32), old=None)
    counts = counts_of(config, inputs, 7)
    loss = policy_loss(config, inputs, counts)
    assert (loss.ratios == 1).all() and not (loss.clipped_low | loss.clipped_high).any()
    (gradient,) = torch.autograd.grad(loss.loss, inputs.policy)
    divided = {
        "sequence_mean": 7 * inputs.lengths,
        "token_mean": torch.tensor(22),
        "max_length": torch.tensor(49),
        "sequence_sum": torch.tensor(7),
    }
    expected = -inputs.advantages / divided[config.form.aggregate]
    close(gradient, expected.repeat_interleave(inputs.lengths), 1e-6)


@pytest.mark.parametrize(
    ("aggregate", "all_count", "masked"),
    [
        # Advantage -1 and ratio 1, so that each token costs 1: responses of 2, 4 and 6 tokens, the last one truncated.
        ("sequence_mean", (1 + 1 + 1) / 3, (1 + 1) / 2),
        ("token_mean", 12 / 12, 6 / 6),
        ("max_length", 12 / (3 * 8), 6 / (3 * 8)),
        ("sequence_sum", 12 / 3, 6 / 2),
    ],
)
def test_truncated_responses_are_left_out_of_the_loss_and_of_its_own_denominators(aggregate, all_count, masked):
    lengths = torch.tensor([2, 4, 6])
    inputs = PolicyInputs(
        torch.full((12,), -1.0, requires_grad=True),
        lengths,
        -torch.ones(3),
        torch.tensor([False, False, True]),
        torch.ones(3, dtype=torch.bool),
    )
    for mask, expected in ((False, all_count), (True, masked)):
        config = PolicyLossConfig(aggregate=aggregate, mask_truncated=mask)
        loss = policy_loss(config, inputs, counts_of(config, inputs, 8))
        assert loss.loss.item() == pytest.approx(expected)
        assert loss.counts.sum() == (6 if mask else 12)


def test_window_in_which_no_response_counts_has_neither_loss_nor_gradient():
    inputs = replace(a_step(), scored=torch.zeros(8, dtype=torch.bool))
    for aggregate in get_args(Aggregate):
        config = PolicyLossConfig(aggregate=aggregate, kl_weight=0.1)
        loss = policy_loss(config, inputs, counts_of(config, inputs, 7))
        (gradient,) = torch.autograd.grad(loss.loss, inputs.policy)
        assert loss.loss == 0 and (gradient == 0).all()


def test_corrections_worked_by_hand():
    """Old to sampler: 2 and 1/2 in the first response, 3 in the second; products 1 and 3."""
    sampler = torch.tensor([-2.0, -2.0, -4.0])
    old = sampler + torch.tensor([2.0, 0.5, 3.0]).log()
    inputs = PolicyInputs(
        old.clone().requires_grad_(),
        torch.tensor([2, 1]),
        -torch.ones(2),
        torch.zeros(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.bool),
        old,
        sampler,
    )
    for name, cap, weights in (
        ("token_truncate", 1.5, [1.5, 0.5, 1.5]),
        ("sequence_mask", 2.0, [1.0, 1.0, 0.0]),
        ("sequence_mask", 4.0, [1.0, 1.0, 3.0]),
    ):
        config = PolicyLossConfig("dapo", correction=name, correction_cap=cap)
        loss = policy_loss(config, inputs, counts_of(config, inputs))
        close(loss.corrections, weights, 1e-6)
        assert loss.loss.item() == pytest.approx(sum(weights) / 3, rel=1e-6)  # the denominator stays


def test_clipped_tokens_are_those_without_a_gradient():
    ratios = torch.tensor([0.5, 1.5, 0.5, 1.5, 1.0])
    inputs = PolicyInputs(
        ratios.log().requires_grad_(),
        torch.tensor([2, 3]),
        torch.tensor([1.0, -1.0]),
        torch.zeros(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.bool),
        torch.zeros(5),
    )
    config = PolicyLossConfig()
    loss = policy_loss(config, inputs, counts_of(config, inputs))
    close(loss.ratios, ratios, 1e-6)
    assert loss.clipped_low.tolist() == [False, False, True, False, False]
    assert loss.clipped_high.tolist() == [False, True, False, False, False]
    (gradient,) = torch.autograd.grad(loss.loss, inputs.policy)
    assert ((gradient == 0) == (loss.clipped_low | loss.clipped_high)).all()
    capped = policy_loss(PolicyLossConfig("cispo", epsilon_high=1.2), inputs, counts_of(config, inputs))
    assert capped.clipped_high.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("correction", get_args(Correction))
def test_loss_and_gradient_are_finite_however_far_the_policies_are_apart(name, correction):
    for old, sampler, reference, advantage in itertools.product(*[(-1e4, 1e4)] * 3, (-1.0, 1.0)):
        policy = torch.full((6,), -1.0, requires_grad=True)
        inputs = PolicyInputs(
            policy,
            torch.tensor([2, 4]),
            torch.full((2,), advantage),
            torch.zeros(2, dtype=torch.bool),
            torch.ones(2, dtype=torch.bool),
            *(torch.full((6,), -1.0 + apart) for apart in (old, sampler, reference)),
        )
        for bias_correction in (False, True):
            config = PolicyLossConfig(name, kl_weight=0.1, kl_bias_correction=bias_correction, correction=correction)
            loss = policy_loss(config, inputs, counts_of(config, inputs, 4)).loss
            (gradient,) = torch.autograd.grad(loss, policy)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all(), (old, sampler, reference, advantage)


def test_token_far_too_likely_under_the_policy_is_still_pushed_down():
    """Where exp would overflow: a gradient of 0 would leave it there."""
    inputs = PolicyInputs(
        torch.tensor([-1.0], requires_grad=True),
        torch.tensor([1]),
        torch.tensor([-1.0]),
        torch.tensor([False]),
        torch.tensor([True]),
        torch.tensor([-1e4]),
    )
    (gradient,) = torch.autograd.grad(
        policy_loss(PolicyLossConfig(), inputs, WindowCounts(1, 1, 1)).loss, inputs.policy
    )
    assert gradient.item() > 1


def test_missing_log_probabilities_and_lengths_are_refused():
    inputs, counts = replace(a_step(), sampler=None, reference=None), WindowCounts(7, 7, 22)
    for config, message in (
        (PolicyLossConfig(correction="sequence_mask"), "sequence_mask needs the sampler's log-probabilities"),
        (PolicyLossConfig(kl_weight=0.1), "kl_weight needs the log-probabilities under the reference"),
        (PolicyLossConfig("dr_grpo"), "max_length needs the most tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_loss(config, inputs, counts)


# Settings.


def test_names_stand_for_the_papers_choices():
    table = {name: (f.objective, f.ratio, f.aggregate, f.advantage) for name, f in PRESETS.items()}
    assert table == {
        "grpo": ("clip", "token", "sequence_mean", "group"),
        "dr_grpo": ("clip", "token", "max_length", "none"),
        "dapo": ("clip", "token", "token_mean", "group"),
        "bnpo": ("clip", "token", "token_mean", "group"),
        "gspo": ("clip", "sequence", "sequence_mean", "group"),
        "cispo": ("cispo", "token", "token_mean", "group"),
        "sapo": ("sapo", "token", "sequence_mean", "group"),
        "luspo": ("clip", "sequence", "sequence_sum", "group"),
        "rloo": ("clip", "token", "token_mean", "leave_one_out"),
    }
    config = PolicyLossConfig("gspo", aggregate="token_mean", advantage="batch")
    assert config.form == PolicyForm("clip", "sequence", "token_mean", "batch", PRESETS["gspo"].usual)


def test_usual_values_are_those_of_the_name_while_its_ratio_and_objective_stay():
    def epsilons(config):
        return config.setting("epsilon_low"), config.setting("epsilon_high")

    assert epsilons(PolicyLossConfig()) == (0.2, 0.2) and epsilons(PolicyLossConfig("dapo")) == (0.2, 0.28)
    assert epsilons(PolicyLossConfig("gspo")) == (3e-4, 4e-4) and epsilons(PolicyLossConfig("luspo")) == (2e-3, 2.5e-3)
    assert epsilons(PolicyLossConfig("gspo", ratio="token")) == (0.2, 0.2)
    assert epsilons(PolicyLossConfig("gspo", epsilon_low=0.1)) == (0.1, 4e-4)
    assert PolicyLossConfig("dapo", objective="cispo").setting("epsilon_high") == 5.0
    sapo = PolicyLossConfig("sapo", tau=2.0)
    assert (sapo.setting("tau"), sapo.setting("tau_negative"), sapo.cap) == (2.0, 1.05, 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"name": "cispo", name: 0.1}, f"cispo has no {name}; it reads epsilon_high. Remove {name}.")
          for name in ("epsilon_low", "delta", "tau", "tau_negative")),
        *(({"name": "sapo", name: 0.1}, f"sapo has no {name}; it reads tau, tau_negative. Remove {name}.")
          for name in ("epsilon_low", "epsilon_high", "delta")),
        *(({name: 0.1}, f"clip has no {name}; it reads epsilon_low, epsilon_high, delta.")
          for name in ("tau", "tau_negative")),
        ({"name": "sapo", "objective": "clip", "tau": 1.0}, "clip has no tau"),
        ({"kl_bias_correction": True}, "kl_bias_correction has no effect while kl_weight is 0"),
        ({"kl_bias_correction": False}, "kl_bias_correction has no effect while kl_weight is 0"),
        ({"correction_cap": 2.0}, "correction_cap has no effect without correction"),
        ({"kl_weight": -0.1}, "kl_weight is -0.1; use 0 or more."),
        ({"kl_weight": NAN}, "kl_weight is nan; use 0 or more."),
        ({"epsilon_low": -0.1}, "epsilon_low is -0.1; use 0 or more."),
        ({"epsilon_low": 1.5}, "epsilon_low is 1.5; no ratio is below 0, so use at most 1."),
        ({"name": "cispo", "epsilon_high": 0.0}, "epsilon_high is 0.0; use more than 0."),
        ({"delta": 0.0}, "delta is 0.0; use more than 0."),
        ({"name": "sapo", "tau": math.inf}, "tau is inf; use more than 0."),
        ({"correction": "token_truncate", "correction_cap": 0.0}, "correction_cap is 0.0; use more than 0."),
        ({"name": "ppo"}, "name is 'ppo'; choose grpo, dr_grpo"),
        ({"name": None}, "name is None; choose grpo"),
        ({"aggregate": "mean"}, "aggregate is 'mean'; choose sequence_mean, token_mean"),
    ],
)  # fmt: skip
def test_setting_without_effect_or_sense_is_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        PolicyLossConfig(**settings)
    assert str(error.value).startswith("model.loss: ") and message in str(error.value)


def test_settings_at_the_ends_of_their_ranges_are_taken():
    PolicyLossConfig(epsilon_low=0.0, epsilon_high=0.0, kl_weight=0.0)
    PolicyLossConfig(epsilon_low=1.0, kl_weight=0.1, kl_bias_correction=False)
