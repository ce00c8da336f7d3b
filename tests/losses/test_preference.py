"""Worked cases of every loss, and what holds for all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_alignment.errors import ConfigError
from lit_alignment.losses.pairs import ResponseLogps, pair_loss, pairs_of, response_loss, responses_of, rewards
from lit_alignment.losses.preference_config import FORMS, LossConfig

VECTORS = json.loads((Path(__file__).parent / "preference_vectors.json").read_text())
# What the cases, and the papers, call our settings.
NAMES = {
    "f_divergence": "divergence",
    "f_alpha": "divergence_alpha",
    "ld_alpha": "tail_weight",
    "gamma": "target_margin",
    "delta": "target_margin",
    "alpha_reward": "power",
}
LETTERS = {
    ("length_penalty", "alpha"): "length_weight",
    ("slic", "lambda"): "nll_weight",
    ("dpop", "lambda"): "penalty",
    ("orpo", "lambda"): "odds_weight",
    ("asft", "lambda"): "odds_weight",
}
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
FULL_AND_OURS = ("DPO, full logits", "our DPO")
PAIRED = [name for name, form in FORMS.items() if form.of == "pairs"]


def config_of(case):
    settings = {}
    for name, value in case["hyperparameters"].items():
        if name.startswith("w_"):
            assert (name, value) in {("w_sigmoid", 0.8), ("w_bco", 0.2), ("w_sft", 1.0)}
            continue
        name = LETTERS.get((case["loss"], name)) or NAMES.get(name) or ("nll_weight" if name == "alpha" else name)
        settings[name] = "alpha" if value == "alpha_divergence" else value
    return LossConfig(case["loss"], **settings)


def tokens_of(responses, dtype, prefix=""):
    """Log-probabilities of all tokens under the policy and the reference, with the lengths of the responses."""
    policy, reference = (
        torch.tensor(
            [value for response in responses for value in response[f"{prefix}{name}_token_logps"]], dtype=dtype
        )
        for name in ("policy", "reference")
    )
    lengths = [len(response[f"{prefix}policy_token_logps"]) for response in responses]
    return policy.requires_grad_(), reference, lengths, torch.tensor(lengths)


def close(found, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=tolerance)


def firsts(values, lengths):
    """The value of each response's first token, [S]: what each token's is where only sums count."""
    return torch.stack([part[0] for part in torch.split(values, lengths)])


def pairs_in(batch, dtype, with_reference=True, baselines=None):
    """Chosen responses before all rejected ones."""
    policy, reference, lengths, counts = tokens_of([r[side] for side in ("chosen", "rejected") for r in batch], dtype)
    number = len(batch)
    sides = torch.arange(number), torch.arange(number, 2 * number)
    margins = torch.tensor([record["margin"] for record in batch], dtype=dtype)
    found = pairs_of(policy, reference if with_reference else None, lengths, counts, *sides, margins, baselines)
    return policy, lengths, found


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", [c for c in VECTORS["cases"] if c["kind"] == "pairs"], ids=lambda c: c["id"])
def test_worked_case_of_pairs(case, dtype, tolerance):
    config, expected = config_of(case), case["expected"]
    assert config.form.needs_reference is not case["reference_free"]
    policy, lengths, pairs = pairs_in(VECTORS["pair_batches"][case["batch"]], dtype, config.form.needs_reference)
    loss = pair_loss(config, pairs)
    close(loss, expected["loss_per_pair"], tolerance)
    close(loss.mean(), expected["loss_mean"], tolerance)
    if "chosen_rewards" not in expected:
        return
    chosen, rejected = rewards([config], pairs.chosen), rewards([config], pairs.rejected)
    close(chosen, expected["chosen_rewards"], tolerance)
    close(rejected, expected["rejected_rewards"], tolerance)
    assert float((chosen > rejected).double().mean()) == expected["accuracy"]
    (gradient,) = torch.autograd.grad(loss.mean(), policy)
    sides = firsts(gradient, lengths).chunk(2)
    close(sides[0], expected["grad_of_mean_by_chosen_logp_sum"], tolerance)
    close(sides[1], expected["grad_of_mean_by_rejected_logp_sum"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", [c for c in VECTORS["cases"] if c["kind"] == "unpaired"], ids=lambda c: c["id"])
def test_worked_case_of_responses_judged_alone(case, dtype, tolerance):
    config, expected, batch = config_of(case), case["expected"], VECTORS["kto_batches"][case["batch"]]
    policy, *own = tokens_of(batch, dtype)
    responses = responses_of(policy, *own)
    z = responses_of(*tokens_of(batch, dtype, "kl_")).ratio.mean().clamp_min(0).detach()
    z = z if config.form.baseline else 0.0
    loss = response_loss(config, responses, torch.tensor([record["label"] for record in batch]), z)
    close(torch.as_tensor(z, dtype=dtype), expected["kl"], tolerance)
    close(loss, expected["loss_per_example"], tolerance)
    close(loss.mean(), expected["loss_mean"], tolerance)
    close(rewards([config], responses), expected["rewards"], tolerance)
    (gradient,) = torch.autograd.grad(loss.mean(), policy)
    close(firsts(gradient, own[1]), expected["grad_of_mean_by_logp_sum"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_worked_case_of_kto_over_pairs(dtype, tolerance):
    (case,) = (case for case in VECTORS["cases"] if case["kind"] == "batch")
    expected, batch = case["expected"], VECTORS["pair_batches"][case["batch"]]
    _, _, alone = pairs_in(batch, dtype)
    baselines = torch.stack([side.ratio.mean().clamp_min(0).detach() for side in (alone.chosen, alone.rejected)])
    close(baselines, [expected["kl_chosen"], expected["kl_rejected"]], tolerance)
    loss = pair_loss(config_of(case), pairs_in(batch, dtype, baselines=baselines)[2])
    both = torch.tensor([expected["chosen_losses"], expected["rejected_losses"]], dtype=torch.float64)
    close(loss, both.mean(0), tolerance)
    close(loss.mean(), expected["loss_mean"], tolerance)


def pair_apart(chosen, rejected, tokens=10):
    """One pair whose log-ratios are given, over responses of as many tokens; the reference is uniform over two."""
    ratios = torch.tensor([chosen / tokens] * tokens + [rejected / tokens] * tokens)
    reference = torch.full((2 * tokens,), -1.0)
    policy = (reference + ratios).requires_grad_()
    counts = torch.tensor([tokens, tokens])
    found = pairs_of(
        policy, reference, [tokens] * 2, counts, torch.tensor([0]), torch.tensor([1]), torch.ones(1), torch.zeros(2)
    )
    return policy, found


@pytest.mark.parametrize("name", PAIRED)
def test_loss_and_gradient_are_finite_however_far_the_responses_are_apart(name):
    for chosen, rejected in ((1e4, 0.0), (-1e4, 0.0), (0.0, 1e4), (0.0, -1e4), (5e3, -5e3), (-5e3, 5e3)):
        for settings in ({}, *({"divergence": kind} for kind in ("forward_kl", "js", "alpha"))):
            if settings and "divergence" not in FORMS[name].reads:
                continue
            policy, pairs = pair_apart(chosen, rejected)
            loss = pair_loss(LossConfig(name, **settings), pairs)
            (gradient,) = torch.autograd.grad(loss.sum(), policy)
            assert torch.isfinite(loss).all() and torch.isfinite(gradient).all(), (chosen, rejected, settings)


@pytest.mark.parametrize("name", ["orpo", "asft"])
@pytest.mark.parametrize("mean", [-1e-7, 0.0, -1e3])
def test_odds_are_finite_at_the_ends(name, mean):
    for means in ((mean, -1.0), (-1.0, mean), (mean, mean)):
        policy = torch.tensor([[value] * 4 for value in means]).flatten().requires_grad_()
        indices = torch.tensor([0]), torch.tensor([1])
        pairs = pairs_of(policy, None, [4, 4], torch.tensor([4, 4]), *indices, torch.zeros(1))
        loss = pair_loss(LossConfig(name), pairs)
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_discopop_is_its_formula_where_the_parts_overflow():
    _, pairs = pair_apart(-1e4, 0.0)
    # g exp(-x) of x = -1000 and tau = 1 is sigmoid(-1000) e^1000 = 1, and (1 - g) softplus(1000) = 1000.
    assert pair_loss(LossConfig("discopop", tau=1.0), pairs).item() == pytest.approx(1001.0)


@pytest.mark.parametrize("name", [name for name in PAIRED if name != "sft"])
def test_a_step_along_the_gradient_moves_the_responses_apart(name):
    policy, pairs = pair_apart(2.0, -2.0)
    (gradient,) = torch.autograd.grad(pair_loss(LossConfig(name), pairs).sum(), policy)
    apart = gradient[:10].sum() - gradient[10:].sum()
    assert apart < 0 if name != "ddpo" else apart != 0  # it moves to the margin, wherever that is


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "alphapo", "orpo", "asft"])
def test_means_over_tokens_do_not_depend_on_length(name):
    (_, short), (_, long) = pair_apart(1.0, -1.0, tokens=4), pair_apart(3.0, -3.0, tokens=12)
    config = LossConfig(name)
    assert torch.allclose(pair_loss(config, short), pair_loss(config, long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sft", "beta": 0.1}, "sft has no beta; it reads none but weight. Remove beta."),
        ({"name": "ipo", "label_smoothing": 0.1}, "ipo has no label_smoothing; it reads beta."),
        ({"name": "sigmoid", "divergence_alpha": 0.3}, "no effect without divergence: alpha"),
        ({"name": "sigmoid", "beta": 0.0}, "sigmoid.beta is 0.0; use more than 0"),
        ({"name": "sigmoid", "beta": float("nan")}, "beta is nan"),
        ({"name": "sigmoid", "weight": -1.0}, "weight is -1.0; use 0 or more"),
        ({"name": "robust", "label_smoothing": 0.5}, "use 0 or more, and less than 0.5"),
        ({"name": "exo_pair", "label_smoothing": 0.0}, "use more than 0, and less than 0.5"),
        ({"name": "sigmoid", "divergence": "alpha", "divergence_alpha": 1.0}, "divergence_alpha is 1"),
        ({"name": "dpo"}, "'dpo' is no loss; there are sigmoid, robust"),
    ],
)
def test_setting_without_effect_or_sense_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        LossConfig(**settings)


def test_a_loss_of_responses_is_none_of_pairs():
    with pytest.raises(ConfigError, match="judged alone"):
        pair_loss(LossConfig("kto"), pair_apart(0.0, 0.0)[1])


@pytest.mark.exhaustive
def test_logits_of_all_responses_never_exist_together():
    """Added peak memory of DPO's loss at 131,072 entries, against full logits; each in a process of its own."""
    script = str(Path(__file__).parents[2] / "benchmarks/loss_memory.py")
    command = [sys.executable, script, "--rounds", "1", "--form"]
    words = [subprocess.check_output([*command, form]).split() for form in FULL_AND_OURS]
    (full_loss, _, full), (loss, _, added) = (map(float, each) for each in words)
    assert loss == pytest.approx(full_loss, rel=1e-5) and added <= 0.15 * full


def test_estimate_is_none_of_a_loss_that_takes_zero_in_its_place():
    """In a mix with kto, whose z is that of all losses."""
    responses = ResponseLogps(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0]), torch.tensor([2, 2]))
    good = torch.tensor([True, False])
    found, zero = (response_loss(LossConfig("apo_zero_unpaired"), responses, good, z) for z in (1.5, 0.0))
    assert torch.equal(found, zero)
    assert not torch.equal(response_loss(LossConfig("kto"), responses, good, 1.5), zero)
