"""Tiny policies, what they are asked, and the trainer's log-probabilities of what they answer."""

import torch
from peft import LoraConfig

from lit_alignment import SFTModule
from lit_alignment.data.batching.collate import collate_responses
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX
from lit_alignment.generation.engine import Request
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.logprobs import target_logps
from lit_alignment.models.stop_rule import StopRule
from lit_alignment.rollout.samplers import SampledPolicy

STOP = StopRule([2], [])


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def policy(base, peft=None, **settings):
    """A policy in training; `base` is a folder."""
    module = SFTModule(BackboneConfig(base), peft)
    module.load_model()
    module.network.train()
    return SampledPolicy(module.network, module.tokenizer, module.backbone, **settings)


@torch.no_grad()
def move(network, seed, size=0.3):
    """Change the weights that train, as an optimizer step would, but by much."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def requests(decoding, lengths, seed=0):
    """A prompt of each length; all begin with the same tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 700, (max(lengths),), generator=generator).tolist()
    return [Request([*ids[: length - 1], 10 + length], decoding, STOP, seed=seed) for length in lengths]


@torch.no_grad()
def trainer_logps(network, asked, responses, temperature):
    """As a training step computes them, of all tokens one after another."""
    groups = []
    for request, completions in zip(asked, responses, strict=True):
        prompt, group = list(request.token_ids), []
        for completion in completions:
            tokens = completion.token_ids
            labels, weights = [IGNORE_INDEX] * len(prompt) + tokens, [0.0] * len(prompt) + [1.0] * len(tokens)
            group.append(Example(prompt + tokens, labels, weights))
        groups.append(group)
    return target_logps(network, collate_responses(groups, pad_token_id=0), temperature=temperature)


def sampled_logps(responses):
    return torch.tensor([value for group in responses for each in group for value in each.logps])
