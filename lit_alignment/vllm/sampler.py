"""Rollouts by vLLM beside the trainer: the base in vLLM, and its adapter as it is at each step."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftModel
from safetensors import SafetensorError
from torch import distributed

from lit_alignment.errors import ConfigError, TrainingError, present
from lit_alignment.generation.engine import Completion, Request
from lit_alignment.models.adapters import is_prompt_learning, save_adapter, why_merge
from lit_alignment.models.head import base_model
from lit_alignment.paths import local_path
from lit_alignment.rollout.samplers import SampledPolicy, Sampler, requests_with, responses_of
from lit_alignment.vllm.engine import VLLMEngine, engine_arguments, import_vllm, on_cpu
from lit_alignment.vllm.model import lora_rank

MEMORY = "/dev/shm"  # noqa: S108 - a folder of its own is made in it
NAME, NUMBER = "policy", 1  # of the adapter in the engine
OURS = ("model", "revision", "tokenizer", "runner", "enable_lora", "max_loras", "max_lora_rank", "logprobs_mode")
# Mean difference of a token's log-probability, in nats: what kernels that round otherwise make of it.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class VLLMSampler(Sampler):
    """Samples with an engine of vLLM on the trainer's own machine, for one process that trains a LoRA adapter.

    Args:
        settings: Arguments of vLLM's engine, as `max_model_len`, or `gpu_memory_utilization`: the share of the GPU's
            memory that is not the trainer's.
        tolerance: Largest mean difference from the trainer's log-probabilities, in nats per token; by default that of
            the engine's precision.
    """

    beside = "vLLM's copy of the base, with its keys and values,"

    def __init__(self, settings: dict[str, Any] | None = None, tolerance: float | None = None) -> None:
        """Refuse what follows from the policy."""
        self.settings = settings or {}
        for name in OURS:
            if name in self.settings:
                raise ConfigError(f"model.engine: settings.{name} follows from the policy: leave it out.")
        self._given_tolerance = tolerance
        self.advice = (
            "Set model.engine.init_args.settings.dtype to the precision that trains, or raise "
            "model.engine.init_args.tolerance and use model.loss.correction."
        )
        self._engine: VLLMEngine | None = None
        self._adapters: AdapterFolders | None = None

    def start(self, policy: SampledPolicy) -> None:
        """Load the base into vLLM.

        Raises:
            ConfigError: If vLLM is not installed, or cannot hold the policy.
        """
        check_adapter(policy)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ConfigError(
                "model.engine: VLLMSampler is for one process. Use ServerSampler, or TransformersSampler."
            )
        import_vllm()
        adapters = AdapterFolders(policy.network, Path(MEMORY) if os.access(MEMORY, os.W_OK) else None)
        self._adapters = adapters
        rank = lora_rank(str(adapters.write()))
        arguments = engine_arguments(_settings(policy) | {"max_lora_rank": rank} | self.settings)
        with isolate_rng():  # an engine in the trainer's process seeds it
            self._engine = VLLMEngine(arguments, policy.tokenizer)
        usual = max(TOLERANCE[self._engine.dtype], TOLERANCE[base_model(policy.network).dtype])
        self.tolerance = usual if self._given_tolerance is None else self._given_tolerance

    def sync(self, step: int) -> None:
        """Have the engine answer with the adapter as it is now, and with no keys of an earlier one.

        Raises:
            TrainingError: If the adapter cannot be written, or vLLM refuses it.
        """
        from vllm.lora.request import LoRARequest

        engine, adapters = present(self._engine, "the engine"), present(self._adapters, "the adapter's folder")
        folder = str(adapters.write())
        try:
            engine.engine.add_lora(LoRARequest(NAME, NUMBER, folder, load_inplace=True))
        except Exception as error:  # by whatever reading it leads to
            raise TrainingError(
                f"model.engine: vLLM refuses the adapter of step {step} ({error}). Change model.peft, or use "
                "TransformersSampler."
            ) from error
        if not engine.engine.reset_prefix_cache():
            raise TrainingError(f"model.engine: vLLM still answers requests at step {step}. Please report this.")
        # Requests do not say load_inplace: vLLM would read the folder at each token.
        engine.lora = LoRARequest(NAME, NUMBER, folder)
        adapters.keep_last()

    def sample(self, requests: Sequence[Request], wanted_logps: bool = True) -> list[list[Completion]]:
        """Responses to each request, always with `logps`."""
        engine = present(self._engine, "the engine")
        with isolate_rng():
            return responses_of(engine.generate(requests_with(requests, logprobs=True)))

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close()
        if self._adapters is not None:
            self._adapters.remove()
        self._engine = self._adapters = None


def _settings(policy: SampledPolicy) -> dict[str, Any]:
    """As the trainer computes, with log-probabilities of what is sampled from."""
    backbone = policy.backbone
    found: dict[str, Any] = {
        "model": local_path(backbone.path),
        "revision": backbone.revision,
        "trust_remote_code": backbone.trust_remote_code,
        "dtype": str(base_model(policy.network).dtype).removeprefix("torch."),
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_lora": True,
        "max_loras": 1,
    }
    if backbone.tokenizer is not None:
        found["tokenizer"] = local_path(backbone.tokenizer)
    return found | ({"enforce_eager": True} if on_cpu() else {"gpu_memory_utilization": 0.4})


def check_adapter(policy: SampledPolicy) -> None:
    """Refuse a policy that is more than a base which vLLM loads with an adapter which it holds beside that.

    Raises:
        ConfigError: Saying why.
    """
    network, instead = policy.network, "or use TransformersSampler"
    if not isinstance(network, PeftModel):
        raise ConfigError(
            "model.engine: vLLM on CPU cannot load weights into a running engine, so it samples from adapters only. "
            f"Train an adapter (model.peft), {instead}."
        )
    if policy.backbone.weights == "random":
        raise ConfigError(
            "model.engine: vLLM loads the base from its folder, and backbone.weights is random. Use pretrained ones, "
            f"{instead}."
        )
    if policy.sharded:
        raise ConfigError(f"model.engine: vLLM takes whole adapters, which this strategy shards. Use DDP, {instead}.")
    reason = why_merge(network)
    if is_prompt_learning(network):
        reason = f"{type(network.active_peft_config).__name__} puts virtual tokens before the prompt"
    if reason:
        raise ConfigError(
            f"model.engine: vLLM cannot hold this adapter beside its base, since {reason}. Use peft.LoraConfig without "
            f"that, {instead}."
        )


class AdapterFolders:
    """Where an adapter is written as it is, each time into another folder: vLLM may have mapped the last one's file.

    Args:
        network: The model with the adapter.
        parent: Where to make a folder for them; None is the system's place for temporary files.
    """

    def __init__(self, network: PeftModel, parent: Path | None) -> None:
        """Make the folder that has them all; names in it are unique among runs.

        Raises:
            TrainingError: If it cannot be made.
        """
        self.network = network
        try:
            self._made = tempfile.TemporaryDirectory(prefix=f"{NAME}-", dir=parent, ignore_cleanup_errors=True)
        except OSError as error:
            raise TrainingError(f"{parent}: no folder for adapters can be made in it ({error}).") from error
        self.root = Path(self._made.name)
        self._written: list[Path] = []
        self._number = 0

    def write(self) -> Path:
        """The adapter as it is now.

        Raises:
            TrainingError: If it cannot be written.
        """
        folder = self.root / f"{self.root.name}-{self._number}"
        try:
            save_adapter(self.network, folder)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{folder}: the adapter cannot be written for vLLM ({error}). Make room there, and resume from a "
                "checkpoint."
            ) from error
        self._number += 1
        self._written.append(folder)
        return folder

    def keep_last(self) -> None:
        """Remove all folders but the last one."""
        for folder in self._written[:-1]:
            shutil.rmtree(folder, ignore_errors=True)
        self._written = self._written[-1:]

    def remove(self) -> None:
        """Remove everything; the end of the process does it too."""
        self._made.cleanup()
