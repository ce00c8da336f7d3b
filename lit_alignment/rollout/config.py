"""How responses are sampled in training."""

from dataclasses import dataclass, field

from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled in training.

    Args:
        num_responses: Responses to each prompt.
        max_new_tokens: Longest response, in tokens; a longer one is cut.
        temperature: Of sampling; the policy that trains is the one at this temperature.
        top_p: Sample from the smallest set of tokens with this much probability.
        top_k: Sample from this many tokens; 0 is no limit.
        stop_strings: A response ends before the first of these, besides at the end-of-turn token.
        seed: Seed of sampling, together with the optimizer step and the prompt.
        steps_per_rollout: Optimizer steps that train on one rollout, each on its own prompts.
        max_redraws: How often the responses to a prompt are drawn again if all have the same reward.
    """

    num_responses: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: list[str] = field(default_factory=list)
    seed: int = 0
    steps_per_rollout: int = 1
    max_redraws: int = 0

    def __post_init__(self) -> None:
        """Refuse what gives no group to compare."""
        if self.num_responses < 1 or self.steps_per_rollout < 1 or self.max_redraws < 0:
            raise ConfigError(
                "model.rollout: num_responses and steps_per_rollout must be 1 or more, and max_redraws 0 or more."
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"model.rollout.temperature is {self.temperature}: responses are sampled. Use a number above 0."
            )

    @property
    def decoding(self) -> DecodingConfig:
        """The same for an engine."""
        return DecodingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            num_return_sequences=self.num_responses,
            stop_strings=self.stop_strings,
            seed=self.seed,
        )

    @property
    def greedy(self) -> DecodingConfig:
        """For the answers to validation prompts."""
        return DecodingConfig(max_new_tokens=self.max_new_tokens, stop_strings=self.stop_strings)
