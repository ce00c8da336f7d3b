"""Responses of a rollout: whose weights, which distribution, which order."""

import pytest
import torch

from lit_alignment.errors import ConfigError, TrainingError
from lit_alignment.generation.engine import Completion, Refusal
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.generation.transformers_engine import TransformersEngine
from lit_alignment.rollout.samplers import TransformersSampler, check_sampling, responses_of
from tests.helpers import base_model_folder
from tests.helpers.samplers import lora, move, policy, requests, sampled_logps, trainer_logps

DRAWN = DecodingConfig(max_new_tokens=12, temperature=0.7, num_return_sequences=3)


@pytest.fixture
def base(tmp_path):
    return base_model_folder(tmp_path / "base")


def started(base, peft=None, **settings):
    sampler, found = TransformersSampler(**settings), policy(base, peft)
    move(found.network, seed=0, size=0.1)
    sampler.start(found)
    sampler.sync(0)
    return sampler, found


def test_log_probabilities_are_those_of_the_trainer_at_the_temperature_of_sampling(base):
    """O1, and the same from the whole logits."""
    sampler, found = started(base)
    asked = requests(DRAWN, [3, 9, 20])
    responses = sampler.sample(asked)
    logps = sampled_logps(responses)
    torch.testing.assert_close(logps, trainer_logps(found.network, asked, responses, 0.7), rtol=0, atol=1e-5)
    assert float((logps - trainer_logps(found.network, asked, responses, 1.0)).abs().max()) > 0.05
    prompt, answer = list(asked[1].token_ids), responses[1][2]
    with torch.no_grad():
        logits = found.network(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
    by_hand = torch.log_softmax(logits / 0.7, dim=-1)[range(answer.num_tokens), answer.token_ids]
    torch.testing.assert_close(torch.tensor(answer.logps), by_hand, rtol=0, atol=1e-5)


def test_predictions_keep_log_probabilities_at_temperature_one(base):
    _, found = started(base)
    asked = requests(DecodingConfig(max_new_tokens=8, temperature=0.7, logprobs=True), [3, 9])
    responses = TransformersEngine(found.network, found.tokenizer).generate(asked)
    expected = trainer_logps(found.network, asked, responses, 1.0)
    torch.testing.assert_close(sampled_logps(responses), expected, rtol=0, atol=1e-5)


def test_unwanted_log_probabilities_are_not_computed_whatever_the_decoding_says(base, monkeypatch):
    sampler, _ = started(base)
    monkeypatch.delattr(TransformersEngine, "_with_logps")
    asked = requests(DecodingConfig(max_new_tokens=4, temperature=1.0, logprobs=True), [3, 9])
    assert all(each.logps is None for group in sampler.sample(asked, wanted_logps=False) for each in group)


def test_samples_are_from_the_weights_as_they_are_now(base):
    """Those of a model that has had the changed weights from the start."""
    sampler, found = started(base, lora())
    asked = requests(DecodingConfig(max_new_tokens=8), [3, 9, 20])
    before = sampler.sample(asked)
    move(found.network, seed=1)
    sampler.sync(1)
    after = sampler.sample(asked)
    merged = found.network.merge_and_unload()
    expected = TransformersEngine(merged, found.tokenizer).generate(asked)
    tokens = [[[each.token_ids for each in group] for group in groups] for groups in (before, after, expected)]
    assert tokens[1] == tokens[2] != tokens[0]


def test_dropout_is_off_while_sampling_and_on_again_afterwards(base):
    sampler, found = started(base, lora(lora_dropout=0.5))
    move(found.network, seed=1)
    first, second = (sampler.sample(requests(DRAWN, [3, 9])) for _ in range(2))
    assert first == second
    expected = trainer_logps(found.network.eval(), requests(DRAWN, [3, 9]), first, 0.7)
    torch.testing.assert_close(sampled_logps(first), expected, rtol=0, atol=1e-5)
    found.network.train()
    sampler.sample(requests(DRAWN, [3]))
    assert all(module.training for module in found.network.modules())


def test_batch_size_counts_responses(base):
    """Draws depend on which prompts stand in a batch, so equal ones say how many did."""
    sampler, found = started(base, batch_size=7)  # two prompts of three responses
    asked = requests(DRAWN, [3, 5, 7, 9, 11])
    expected = TransformersEngine(found.network, found.tokenizer, batch_size=2).generate(asked)
    responses = sampler.sample(asked, wanted_logps=False)
    assert responses == expected and [len(group) for group in responses] == [3] * 5
    assert sampler.sample(requests(DRAWN, [3, 5, 7, 9, 11], seed=1), wanted_logps=False) != expected
    with pytest.raises(ConfigError, match="batch_size is 0"):
        TransformersSampler(batch_size=0)


def test_check_takes_small_differences_and_refuses_large_ones_and_nan(base):
    sampler, found = started(base)
    completions = [Completion([4, 5], [-1.0, -2.0], "", "length"), Completion([6], [-3.0], "", "stop")]
    assert sampler.check(completions, torch.tensor([-1.0, -2.0, -3.0015])) == pytest.approx(0.0005, abs=1e-6)
    with pytest.raises(
        TrainingError, match=r"log-probabilities of 3 tokens differ by 0.1 nats on average \(allowed is"
    ):
        sampler.check(completions, torch.tensor([-1.0, -2.1, -3.2]))
    with pytest.raises(TrainingError, match="differ by nan"):
        sampler.check(completions, torch.tensor([-1.0, float("nan"), -3.0]))
    with pytest.raises(TypeError, match="3 log-probabilities were sampled, 2 are given"):
        sampler.check(completions, torch.tensor([-1.0, -2.0]))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"temperature": 0.0}, "temperature is 0. Set it above 0"),
        ({"top_p": 0.9}, "top_p is 0.9. Set it to 1"),
        ({"top_k": 50}, "top_k is 50. Set it to 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1. Set it to 1"),
        ({"num_beams": 2}, "num_beams is 2. Set it to 1"),
        ({}, "2 tokens are never generated"),
    ],
)
def test_cut_distribution_is_refused_with_a_correction_or_several_steps(settings, problem):
    """O2."""
    decoding = DecodingConfig(**{"temperature": 1.0, **settings})
    never = [] if settings else [7, 8]
    with pytest.raises(ConfigError, match=f"generation: {problem}.*: the correction token_truncate would"):
        check_sampling(decoding, "token_truncate", never=never)
    with pytest.raises(ConfigError, match=f"generation: {problem}.*: 2 steps a rollout would"):
        check_sampling(decoding, steps_per_rollout=2, never=never)
    check_sampling(decoding, never=never)


def test_temperature_alone_goes_with_a_correction_and_several_steps():
    check_sampling(DecodingConfig(temperature=0.7), "sequence_mask", steps_per_rollout=4)


def test_refused_prompt_ends_the_rollout_with_its_reason():
    with pytest.raises(TrainingError, match=r"cannot be answered \(too long\)\. Lower data.encoding.max_length"):
        responses_of([[], Refusal("too long")])
