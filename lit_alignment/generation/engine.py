"""What every engine takes and gives: a stream of requests in, results out as they finish.

T tokens, K labels, Q embeddings of a file, D width
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.multimodal.media import MAX_PIXELS
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.stop_rule import StopRule

FinishReason = Literal["stop", "length"]
NO_STOP = StopRule([], [])


@dataclass(frozen=True)
class Images:
    """Images of a prompt, for an engine that encodes them itself.

    Args:
        files: Their files, in order.
        token_id: The placeholder.
        num_tokens: Placeholders of one image.
        max_pixels: Largest image to decode.
    """

    files: Sequence[str]
    token_id: int
    num_tokens: int
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt for an engine.

    Args:
        token_ids: The prompt.
        decoding: How to generate; None asks for the raw scores at the last token instead.
        stop: What ends a turn besides the decoding's stop strings; nothing else does.
        never: Tokens that are never generated.
        seed: Of sampling, together with the prompt's token ids.
        embeddings: What stands at placeholders instead of their own embeddings: by the placeholder's id those of its
            files in order, [n, Q, D].
        images: Images that the engine is to encode.
        owner: What the caller knows the request by; no engine reads it.
    """

    token_ids: Sequence[int]
    decoding: DecodingConfig | None = None
    stop: StopRule = NO_STOP
    never: Sequence[int] = ()
    seed: int = 0
    embeddings: Mapping[int, Tensor] = field(default_factory=dict)
    images: Images | None = None
    owner: Any = None

    @property
    def stop_strings(self) -> list[str]:
        """All strings before which a completion ends."""
        return [*(self.decoding.stop_strings if self.decoding else []), *self.stop.strings]


@dataclass(frozen=True)
class Completion:
    """What was generated after a prompt.

    Args:
        token_ids: Its tokens, the one that ends the turn included.
        logps: Log-probability of each under the model, at temperature 1, or in a rollout at that of sampling; None if
            not asked for.
        text: Its text, as the decoding asks for it.
        finish_reason: `stop` at an end-of-turn token or stop string, `length` at the limit.
        marginal_logp: Log-probability of the whole where that is no sum over tokens, but one over passages.
    """

    token_ids: list[int]
    logps: list[float] | None
    text: str
    finish_reason: FinishReason
    marginal_logp: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens generated, the end-of-turn token included."""
        return len(self.token_ids)

    @property
    def logp(self) -> float | None:
        """Log-probability of the whole, if asked for."""
        if self.marginal_logp is not None:
            return self.marginal_logp
        return None if self.logps is None else sum(self.logps)

    def prediction(self, number: int) -> dict[str, Any]:
        """As predictions on disk have it; what was not asked for is left out.

        Args:
            number: Its position among the completions of its prompt, from 0.
        """
        line: dict[str, Any] = {"id": str(number), "content": self.text, "finish_reason": self.finish_reason}
        line["num_tokens"] = self.num_tokens
        return line if self.logp is None else line | {"logprob": self.logp}


@dataclass(frozen=True)
class Refusal:
    """A request that the engine cannot answer, and why."""

    problem: str


Result = list[Completion] | Tensor | Refusal


class Engine(ABC):
    """Answers prompts, or scores them."""

    @abstractmethod
    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """Each request with its result, as they finish.

        Args:
            requests: Drawn when there is room for them, so they may be made while others are answered.

        Yields:
            The request itself, and `num_return_sequences` completions, or raw scores in fp32, [K], or a refusal.
        """

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Results in the order of the requests."""
        results = {id(request): result for request, result in self.stream(requests)}
        return [results[id(request)] for request in requests]


@dataclass(frozen=True)
class Response:
    """What a model makes of one item.

    Args:
        completions: What it has generated.
        retrieved: What it has retrieved for them, as predictions on disk have it.
    """

    completions: list[Completion]
    retrieved: dict[str, Any] = field(default_factory=dict)

    def prediction(self) -> dict[str, Any]:
        """As predictions on disk have it."""
        return {"answers": [each.prediction(number) for number, each in enumerate(self.completions)], **self.retrieved}


@dataclass(frozen=True)
class ItemRequests:
    """What an engine is asked for one item of a method.

    Args:
        requests: One prompt each.
        finish: Makes of their results what the method says of the item.
    """

    requests: list[Request]
    finish: Callable[[list[Any]], Any]


@dataclass(frozen=True)
class EngineNeeds:
    """What an engine of another kind must be able to do to run a method's network.

    Args:
        scores: Requests ask for raw scores.
        num_images: The most images that a prompt has for the engine to encode; 0 where it encodes none.
        embeddings: Prompts come with embeddings at their placeholders.
        network: The network in transformers, where something is still computed with it: the embeddings of prompts, or
            the scores with which the engine's are compared.
    """

    scores: bool = False
    num_images: int = 0
    embeddings: bool = False
    network: nn.Module | None = None


def prompt_seed(seed: int, prompts: Sequence[Sequence[int]]) -> int:
    """A seed of the prompts, so that a resumed run draws the same.

    Args:
        seed: That of the requests.
        prompts: Token ids of what is answered together.
    """
    digest = hashlib.sha256(f"{seed}/{list(map(list, prompts))}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_seed(seed: int, step: int) -> int:
    """A seed of the optimizer step at which a model in training is asked; before the first step it is the seed itself.

    Other steps draw other completions of the same prompt, and a run that is repeated draws the same ones.
    """
    if step == 0:
        return seed
    digest = hashlib.sha256(f"{seed} at step {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def cut_completion(
    sequence: Sequence[int],
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    logps: Sequence[float] | None = None,
) -> Completion:
    """Cut generated tokens where the turn ends, and turn them into text.

    Args:
        sequence: Tokens, perhaps with others behind the turn's end.
        request: What was asked.
        tokenizer: Of the model.
        logps: Log-probability of each token, if asked for.
    """
    decoding = request.decoding or DecodingConfig()
    length = turn_length(sequence, request.stop)
    finished = length > 0 and sequence[length - 1] in request.stop.token_ids
    kept = list(sequence[:length])
    body = kept[:-1] if finished and decoding.skip_special_tokens else kept
    text = tokenizer.decode(body, skip_special_tokens=decoding.skip_special_tokens)
    cuts = [text.find(string) for string in request.stop_strings if string in text]
    if cuts:
        # Rows that stopped early are padded until the last one stops; their text ends before the stop string.
        text, finished = text[: min(cuts)], True
        while len(kept) > 1 and kept[-1] == tokenizer.pad_token_id:
            kept.pop()
    if not decoding.remove_prompt:
        text = tokenizer.decode(list(request.token_ids), skip_special_tokens=decoding.skip_special_tokens) + text
    return Completion(kept, None if logps is None else list(logps[: len(kept)]), text, "stop" if finished else "length")


def turn_length(sequence: Sequence[int], stop: StopRule) -> int:
    """Tokens up to and with the first that ends the turn."""
    ends = (position + 1 for position, token in enumerate(sequence) if token in stop.token_ids)
    return next(ends, len(sequence))
