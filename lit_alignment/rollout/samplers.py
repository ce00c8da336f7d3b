"""What samples the responses of a rollout, from the policy as it is.

N tokens
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_alignment.errors import ConfigError, TrainingError, present
from lit_alignment.generation.engine import Completion, Refusal, Request, Result
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.generation.transformers_engine import TransformersEngine
from lit_alignment.models.loading import BackboneConfig


def _run(function: Callable[[], Any]) -> Any:
    return function()


@dataclass(frozen=True, eq=False)
class SampledPolicy:
    """The policy in training, as a sampler is given it.

    Args:
        network: The model that trains, with its adapters.
        tokenizer: Its tokenizer.
        backbone: What it was loaded from.
        sharded: Whether this process has shards of its weights only.
        on_rank_zero: Runs a function on rank 0 and returns its result on all ranks; where it raises, all stop.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    backbone: BackboneConfig
    sharded: bool = False
    on_rank_zero: Callable[[Callable[[], Any]], Any] = _run


class Sampler(ABC):
    """Samples responses from the policy; `model.engine` names its class.

    `start` is called once, `sync` and `sample` for each rollout, `close` at the end; all of them on every rank.

    Attributes:
        exact: Whether it computes with the weights that train, so that no correction is needed.
        tolerance: Mean difference from the trainer's log-probabilities that `check` lets pass, in nats per token.
        advice: What may help where the difference is larger.
        beside: What of it takes memory of the trainer's device, in words.
    """

    exact = False
    tolerance = 1e-3
    advice = ""
    beside = ""

    @abstractmethod
    def start(self, policy: SampledPolicy) -> None:
        """Make ready to sample, before the first `sync`.

        Args:
            policy: The policy, on its device.

        Raises:
            ConfigError: If it cannot sample from such a policy.
        """

    @abstractmethod
    def sync(self, step: int) -> None:
        """Make the next samples come from the weights as they are now.

        Args:
            step: Optimizer steps done, for messages.

        Raises:
            TrainingError: If the weights do not arrive.
        """

    @abstractmethod
    def sample(self, requests: Sequence[Request], wanted_logps: bool = True) -> list[list[Completion]]:
        """`num_return_sequences` responses to each request, in order.

        Args:
            requests: The same number on every rank where the policy is sharded.
            wanted_logps: Give `logps`: log-probabilities under the distribution that was sampled from, softmax(logits /
                temperature). A sampler that is not exact always gives them.

        Raises:
            TrainingError: If a prompt cannot be answered.
        """

    def responses_together(self, num_responses: int) -> int:
        """How many responses the network that trains generates at a time; none where another one does.

        Args:
            num_responses: Responses to each prompt.
        """
        return 0

    def close(self) -> None:
        """Let go of what `start` has taken."""
        return

    def check(self, completions: Sequence[Completion], trainer_logps: Tensor) -> float:
        """Compare the log-probabilities of sampled tokens with the trainer's.

        Args:
            completions: Sampled since the last `sync`, with log-probabilities.
            trainer_logps: Of all their tokens, one after another, at the temperature of sampling, [N].

        Returns:
            Mean of the absolute differences, in nats per token.

        Raises:
            TrainingError: If it is above the tolerance, or non-finite.
        """
        sampled = torch.tensor([value for each in completions for value in each.logps or []], dtype=torch.float64)
        expected = trainer_logps.detach().to("cpu", torch.float64)
        if sampled.shape != expected.shape or sampled.numel() == 0:
            raise TypeError(f"{sampled.numel()} log-probabilities were sampled, {expected.numel()} are given.")
        difference = float((sampled - expected).abs().mean())
        if not difference <= self.tolerance:
            raise TrainingError(
                f"model.engine: {type(self).__name__} samples from another distribution than the one that trains: the "
                f"log-probabilities of {sampled.numel()} tokens differ by {difference:.3g} nats on average (allowed is "
                f"{self.tolerance:g}). {self.advice}"
            )
        return difference


class TransformersSampler(Sampler):
    """Samples with transformers' generate from the network that trains.

    It computes in eval mode and without gradient, under the autocast of the caller. Draws depend on the seed and the
    prompts that stand in a batch together, so a rollout that is repeated in the same order is the same one.

    Args:
        batch_size: Responses to sample together; all those to one prompt always are.
    """

    exact = True
    advice = "Please report this architecture."

    def __init__(self, batch_size: int = 32) -> None:
        """Refuse a batch of nothing."""
        if batch_size < 1:
            raise ConfigError(f"model.engine: batch_size is {batch_size}; use 1 or more.")
        self.batch_size = batch_size
        self._policy: SampledPolicy | None = None

    def start(self, policy: SampledPolicy) -> None:
        """Keep the policy."""
        self._policy = policy

    def sync(self, step: int) -> None:
        """Nothing: the weights are those that train."""
        return

    def sample(self, requests: Sequence[Request], wanted_logps: bool = True) -> list[list[Completion]]:
        """Responses to each request; `logps` takes a forward pass more, so None unless wanted."""
        if not requests:
            return []
        policy = present(self._policy, "the policy")
        asked = requests_with(requests, logprobs=False)
        responses = max(decoding_of(request).num_return_sequences for request in asked)
        prompts = self.responses_together(responses) // responses
        engine = TransformersEngine(policy.network, policy.tokenizer, prompts, policy.sharded, wanted_logps)
        return responses_of(engine.generate(asked))

    def responses_together(self, num_responses: int) -> int:
        """Those to as many prompts as fit into a batch, or to one."""
        return max(1, self.batch_size // num_responses) * num_responses


def check_sampling(
    decoding: DecodingConfig,
    correction: str | None = None,
    steps_per_rollout: int = 1,
    never: Sequence[int] = (),
) -> None:
    """Refuse decoding whose distribution is not softmax(logits / temperature), where log-probabilities are compared.

    Args:
        decoding: How responses are sampled.
        correction: For a sampler that differs from the trainer; None is none.
        steps_per_rollout: Optimizer steps that train on one rollout.
        never: Tokens that are never generated.

    Raises:
        ConfigError: Naming the setting.
    """
    if correction is None and steps_per_rollout == 1:
        return
    cuts = {
        f"temperature is {decoding.temperature:g}. Set it above 0": decoding.temperature == 0,
        f"top_p is {decoding.top_p:g}. Set it to 1": decoding.top_p < 1,
        f"top_k is {decoding.top_k}. Set it to 0": decoding.top_k > 0,
        f"repetition_penalty is {decoding.repetition_penalty:g}. Set it to 1": decoding.repetition_penalty != 1,
        f"num_beams is {decoding.num_beams}. Set it to 1": decoding.num_beams > 1,
        f"{len(never)} tokens are never generated. Let them be": len(never) > 0,
    }
    problem = next((problem for problem, cut in cuts.items() if cut), None)
    if problem is None:
        return
    because = f"the correction {correction}" if correction is not None else f"{steps_per_rollout} steps a rollout"
    raise ConfigError(
        f"generation: {problem}: {because} would compare with log-probabilities of another distribution than the one "
        "that is sampled from. Or use no correction and one optimizer step a rollout."
    )


def decoding_of(request: Request) -> DecodingConfig:
    """How a request is answered, which asks for responses."""
    return present(request.decoding, "the decoding of a request for responses")


def requests_with(requests: Sequence[Request], logprobs: bool) -> list[Request]:
    """Requests that ask an engine for log-probabilities, or do not, whatever they asked before."""
    return [replace(request, decoding=replace(decoding_of(request), logprobs=logprobs)) for request in requests]


def responses_of(results: Sequence[Result]) -> list[list[Completion]]:
    """The responses to each request, of which an engine has refused none.

    Raises:
        TrainingError: Saying why it has.
    """
    found = []
    for result in results:
        if isinstance(result, Refusal):
            raise TrainingError(
                f"model.engine: a prompt cannot be answered ({result.problem}). Lower data.encoding.max_length or "
                "generation.max_new_tokens, or let the engine take longer sequences (max_model_len)."
            )
        if isinstance(result, Tensor):
            raise TypeError("a request asked for scores, not for responses.")
        found.append(result)
    return found
