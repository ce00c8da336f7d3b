"""Rollouts by a vLLM server elsewhere, which is handed the adapter in a folder that it sees too."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from lit_alignment.errors import ConfigError, TrainingError, present, writing
from lit_alignment.generation.engine import Completion, Refusal, Request, Result, cut_completion, prompt_seed
from lit_alignment.rollout.samplers import SampledPolicy, Sampler, decoding_of, requests_with, responses_of
from lit_alignment.vllm.sampler import AdapterFolders, check_adapter

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
START = (
    "Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, --max-lora-rank of model.peft, "
    "--logprobs-mode processed_logprobs"
)
OK = 200


class ServerSampler(Sampler):
    """Samples with a vLLM server that serves the base of a LoRA adapter, from one process or several under DDP.

    Each `sync` loads the adapter under a name of its own, so the server answers from no keys of an earlier one.
    `VLLM_API_KEY` is sent as the key, where it is set.

    Args:
        url: Of the server, without `/v1`.
        folder: Where adapters are written, which the server sees under the same path.
        tolerance: Largest mean difference from the trainer's log-probabilities, in nats per token; the default is for
            bfloat16.
        connections: Prompts that are asked at once.
        timeout: Longest time for the responses to a prompt, in seconds.
    """

    def __init__(
        self, url: str, folder: str, tolerance: float = 5e-2, connections: int = 64, timeout: float = 600.0
    ) -> None:
        """Refuse what is no address of a server."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ConfigError(f"model.engine: url is '{url}'; give one that begins with http:// or https://.")
        if connections < 1 or timeout <= 0:
            raise ConfigError(f"model.engine: connections is {connections} and timeout {timeout}; use more.")
        self.url, self.folder = url.rstrip("/"), Path(folder).expanduser().absolute()
        self.tolerance, self.connections, self.timeout = tolerance, connections, timeout
        self.advice = f"{START} and --dtype of the trainer, or raise model.engine.init_args.tolerance."
        self._policy: SampledPolicy | None = None
        self._adapters: AdapterFolders | None = None  # of the rank that writes
        self._served = ""  # the adapter's name

    def start(self, policy: SampledPolicy) -> None:
        """See that the server answers.

        Raises:
            ConfigError: If vLLM cannot hold the policy.
            TrainingError: If the server does not answer.
        """
        check_adapter(policy)
        self._policy = policy
        status, said = self._ask("GET", "/v1/models")
        if status != OK:
            raise TrainingError(f"model.engine: {self.url}/v1/models answers {status} ({said}). Is it a vLLM server?")

    def sync(self, step: int) -> None:
        """Have the server load the adapter as it is now.

        Raises:
            TrainingError: If it cannot be written, or the server does not load it.
        """
        policy = present(self._policy, "the policy")
        self._served = policy.on_rank_zero(partial(self._load, policy, step))

    def sample(self, requests: Sequence[Request], wanted_logps: bool = True) -> list[list[Completion]]:
        """Responses to each request, always with `logps`."""
        if not requests:
            return []
        with ThreadPoolExecutor(min(self.connections, len(requests))) as pool:
            return responses_of(list(pool.map(self._respond, requests_with(requests, logprobs=True))))

    def close(self) -> None:
        """Have the server let go of the adapter, and remove its folder."""
        if self._adapters is not None:
            with suppress(TrainingError):  # it may have ended before
                self._ask("POST", UNLOAD, {"lora_name": self._served})
            self._adapters.remove()
        self._adapters, self._served = None, ""

    def _load(self, policy: SampledPolicy, step: int) -> str:
        """Name of the adapter, written and loaded; the one before is unloaded."""
        if self._adapters is None:
            with writing(self.folder, TrainingError, "Choose another model.engine.init_args.folder"):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._adapters = AdapterFolders(cast(Any, policy.network), self.folder)
            self._adapters.root.chmod(0o755)  # the server may run as another user
        folder = self._adapters.write()
        # Not load_inplace: the server would read the folder again at each token.
        status, said = self._ask("POST", LOAD, {"lora_name": folder.name, "lora_path": str(folder)})
        if status in (404, 405):
            raise TrainingError(f"model.engine: the server at {self.url} has no {LOAD}. {START}.")
        if status != OK:
            raise TrainingError(
                f"model.engine: the server at {self.url} does not load the adapter of step {step} from {folder} "
                f"({said}). {START}, where it sees this folder."
            )
        if self._served:
            self._ask("POST", UNLOAD, {"lora_name": self._served})
        self._adapters.keep_last()
        return folder.name

    def _respond(self, request: Request) -> Result:
        """What the server answers to a request."""
        status, said = self._ask("POST", "/v1/completions", completion_body(request, self._served))
        if status == 400:
            return Refusal(str(said))
        if status != OK:
            raise TrainingError(f"model.engine: the server at {self.url} answers {status} ({said}).")
        tokenizer = present(self._policy, "the policy").tokenizer
        try:
            choices = sorted(said["choices"], key=lambda choice: int(choice["index"]))
            return [
                cut_completion(choice["token_ids"], request, tokenizer, choice["logprobs"]["token_logprobs"])
                for choice in choices
            ]
        except (KeyError, TypeError) as error:
            raise TrainingError(
                f"model.engine: the server at {self.url} gives no token ids with log-probabilities ({error!r}). Use "
                "vLLM 0.32 or newer."
            ) from error

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status of an answer and what it says: of an error the message alone.

        Raises:
            TrainingError: If there is no answer, or the server wants a key.
        """
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status, text = response.status, response.read().decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            raise TrainingError(
                f"model.engine: no answer from a server at {self.url} ({str(error) or type(error).__name__}). Start "
                "it, or set model.engine.init_args.url or timeout."
            ) from error
        finally:
            connection.close()
        if status == 401:
            raise TrainingError(f"model.engine: the server at {self.url} wants another key. Set VLLM_API_KEY to its.")
        return status, _message(text)


def completion_body(request: Request, model: str) -> dict[str, Any]:
    """A request as vLLM's completions endpoint takes it; it says all that would else come from the server's defaults.

    Args:
        request: A prompt of token ids.
        model: What the server calls the model.

    Raises:
        ConfigError: If the endpoint cannot do it.
    """
    decoding = decoding_of(request)
    if request.images is not None or request.embeddings:
        raise ConfigError("model.engine: ServerSampler takes prompts of text alone. Use TransformersSampler.")
    if decoding.num_beams > 1:
        raise ConfigError("generation.num_beams: vLLM has no beam search. Set it to 1.")
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.token_ids),
        "n": decoding.num_return_sequences,
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": 0.0,
        "repetition_penalty": decoding.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": request.stop_strings,
        "stop_token_ids": request.stop.token_ids,
        "ignore_eos": True,
        "skip_special_tokens": decoding.skip_special_tokens,
        "logprobs": 0,
        "return_token_ids": True,
    }
    if decoding.temperature > 0:
        body["seed"] = prompt_seed(request.seed, [request.token_ids])
    if request.never:
        body["logit_bias"] = {str(token): -100.0 for token in request.never}
    return body


def _message(text: str) -> Any:
    """What an answer says: its JSON, of an error the message in it, or the text as it stands."""
    try:
        said = json.loads(text)
    except ValueError:
        return text.strip()[:300]
    error = said.get("error") if isinstance(said, dict) else None
    return error.get("message", error) if isinstance(error, dict) else said
