"""Rollouts by vLLM beside the trainer: the adapter as it is, and the distribution that is sampled from."""

import random
import time
from dataclasses import replace
from itertools import pairwise

import numpy
import pytest
import torch
from lightning.pytorch import seed_everything
from peft import PromptEncoderConfig

from lit_alignment.errors import ConfigError, TrainingError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.adapters import AdapterConfig, load_adapter
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.reference import add_reference
from lit_alignment.rollout.samplers import TransformersSampler
from lit_alignment.vllm.sampler import AdapterFolders, VLLMSampler, check_adapter
from tests.helpers.samplers import lora, move, policy, requests, sampled_logps, trainer_logps
from tests.vllm.helpers import SMALL

BLOCK = 128  # tokens of a block of vLLM's cache on a CPU
LENGTHS = [5, 20, 60, 100, BLOCK - 1, BLOCK, BLOCK + 1, 150, 180, 200, 220, 240, 257, 280, 300, 320]
DRAWN = DecodingConfig(max_new_tokens=24, temperature=0.7, num_return_sequences=2)
GREEDY = DecodingConfig(max_new_tokens=16)


def started(found):
    sampler = VLLMSampler(SMALL)
    sampler.start(found)
    sampler.sync(0)
    return sampler


@pytest.mark.vllm
@pytest.mark.slow
def test_log_probabilities_are_those_of_the_trainer_at_the_temperature_of_sampling(base):
    """O1; and a policy that has moved on without a sync is noticed."""
    found = policy(base, lora())
    move(found.network, seed=0, size=0.1)
    sampler = started(found)
    try:
        asked = requests(DRAWN, LENGTHS[:8])
        responses = sampler.sample(asked, wanted_logps=False)
        assert [len(group) for group in responses] == [2] * 8 and sampler.sample(asked) == responses
        assert sampler.sample(requests(DRAWN, LENGTHS[:8], seed=1)) != responses
        expected = trainer_logps(found.network, asked, responses, 0.7)
        torch.testing.assert_close(sampled_logps(responses), expected, rtol=0, atol=1e-3)
        completions = [each for group in responses for each in group]
        assert sampler.check(completions, expected) < sampler.tolerance == 1e-3
        move(found.network, seed=1, size=0.05)
        with pytest.raises(TrainingError, match=r"VLLMSampler samples from another distribution .*settings\.dtype"):
            sampler.check(completions, trainer_logps(found.network, asked, responses, 0.7))
    finally:
        sampler.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_after_a_sync_samples_are_from_the_changed_adapter(base):
    """O3, with prompts that fill blocks of the cache, which the adapter before has filled too."""
    found = policy(base, lora())
    sampler, reference = started(found), TransformersSampler()
    reference.start(found)
    asked, answers, seconds = requests(GREEDY, LENGTHS), [], []
    try:
        for step in range(1, 4):
            move(found.network, seed=step, size=0.1)
            begin = time.monotonic()
            sampler.sync(step)
            seconds.append(time.monotonic() - begin)
            tokens, expected = (
                [completion.token_ids for (completion,) in each.sample(asked, wanted_logps=False)]
                for each in (sampler, reference)
            )
            assert tokens == expected
            answers.append(tokens)
    finally:
        sampler.close()
    changed = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairwise(answers)]
    assert min(changed) > len(LENGTHS) // 2  # else an old adapter would pass as well
    assert min(seconds) < 0.2


@pytest.mark.vllm
@pytest.mark.slow
def test_random_state_of_the_trainer_is_left_alone(base):
    """The engine here is in the trainer's own process, and seeds it."""
    found, drawn = policy(base, lora()), []
    for samples in (False, True):
        seed_everything(3, verbose=False)
        if samples:
            sampler = started(found)
            sampler.sample(requests(DRAWN, [5, 20]))
            sampler.close()
        drawn.append((torch.rand(4).tolist(), random.random(), float(numpy.random.rand())))
    assert drawn[0] == drawn[1]


@pytest.mark.vllm
@pytest.mark.slow
def test_prompt_longer_than_the_engine_takes_is_named(base):
    sampler = started(policy(base, lora()))
    try:
        with pytest.raises(TrainingError, match=r"a prompt cannot be answered \(.*512.*max_model_len"):
            sampler.sample(requests(GREEDY, [5, 600]))
    finally:
        sampler.close()


@pytest.mark.parametrize(
    ("peft", "reason"),
    [
        (None, "vLLM on CPU cannot load weights into a running engine, .* Train an adapter"),
        (lora(use_dora=True), "since it uses DoRA"),
        (lora(trainable_token_indices=[7, 8]), "since it holds rows of new tokens"),
        (lora(modules_to_save=["lm_head"]), "since it holds whole layers"),
        (PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PromptEncoderConfig puts virtual tokens"),
    ],
)
def test_policy_that_vllm_cannot_hold_is_refused(base, peft, reason):
    with pytest.raises(ConfigError, match=f"model.engine: .*{reason}.*TransformersSampler"):
        VLLMSampler().start(policy(base, peft))


def test_shards_and_random_bases_are_refused(base):
    found = policy(base, lora())
    with pytest.raises(ConfigError, match="which this strategy shards"):
        check_adapter(replace(found, sharded=True))
    with pytest.raises(ConfigError, match=r"backbone\.weights is random"):
        check_adapter(replace(found, backbone=BackboneConfig(base, weights="random")))


def test_setting_that_follows_from_the_policy_is_refused():
    with pytest.raises(ConfigError, match=r"settings\.logprobs_mode follows from the policy"):
        VLLMSampler({"logprobs_mode": "raw_logprobs"})


def test_each_adapter_is_written_into_another_folder_without_the_reference(base, tmp_path):
    """Each loads as the adapter of its time."""
    found = policy(base, lora())
    add_reference(found.network)
    folders, logits, written = AdapterFolders(found.network, tmp_path), [], []
    ids = torch.arange(3, 40)[None]
    for seed in range(2):
        move(found.network, seed)
        written.append(folders.write())
        with torch.no_grad():
            logits.append(found.network(input_ids=ids).logits)
    assert written[0] != written[1]
    for folder, expected in zip(written, logits, strict=True):
        assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        fresh = base_model(policy(base).network)
        with torch.no_grad():
            loaded = load_adapter(fresh, AdapterConfig(str(folder)), found.tokenizer)(input_ids=ids).logits
        torch.testing.assert_close(loaded, expected)
    folders.keep_last()
    assert not written[0].exists() and written[1].exists()
    folders.remove()
    assert list(tmp_path.glob("policy-*")) == []
