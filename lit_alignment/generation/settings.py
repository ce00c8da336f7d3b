"""How to generate."""

from dataclasses import dataclass, field
from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.moved import renamed


@dataclass(frozen=True)
class DecodingConfig:
    """The decoding configuration: how responses are generated.

    Args:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the most likely token at each step; above 0 samples.
        top_p: Sample from the smallest set of tokens with this much probability.
        top_k: Sample from this many tokens; 0 is no limit.
        num_beams: Beams of beam search; 1 is none.
        num_return_sequences: Answers to each prompt.
        repetition_penalty: Divides the scores of tokens seen before; 1 is none.
        stop_strings: An answer ends before the first of these, besides at the end-of-turn token.
        seed: Seed of sampling.
        skip_special_tokens: Leave special tokens out of the text.
        remove_prompt: Leave the prompt out of the text.
        logprobs: Also give the answer's summed log-probability under the model.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    seed: int = 0
    skip_special_tokens: bool = True
    remove_prompt: bool = True
    logprobs: bool = False

    def __post_init__(self) -> None:
        """Refuse what no engine can do."""
        if self.max_new_tokens < 1 or self.num_beams < 1 or self.num_return_sequences < 1:
            raise ConfigError("generation: max_new_tokens, num_beams and num_return_sequences must be 1 or more.")
        if self.temperature < 0:
            raise ConfigError(f"generation.temperature is {self.temperature}; use 0 (greedy) or more.")
        if not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ConfigError("generation: top_p must be in (0, 1], top_k 0 or more, repetition_penalty above 0.")
        if self.temperature == 0 and self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"generation: {self.num_return_sequences} answers to a prompt need temperature above 0, "
                "or as many beams."
            )
        if any(not stop for stop in self.stop_strings):
            raise ConfigError("generation.stop_strings holds an empty string.")


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
