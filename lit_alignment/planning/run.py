"""Memory of a configured run on each of its devices, and which settings save the most of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig, HeadConfig
from lit_alignment.models.reference import FrozenCopy
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.planning.memory import RolloutShape, StepMemory, Workload, step_memory

GIB = 2**30
USUAL_MEMORY = 80 * GIB  # of a GPU that nothing is said about
NUM_ADVISED = 3  # settings that a message names
KINDS = {"bf16": torch.bfloat16, "16": torch.float16}  # of the Trainer's precision


class Asked(Protocol):
    """Settings of the Trainer by name: those of a parsed configuration, or a dictionary."""

    def __getitem__(self, name: str, /) -> Any:
        """One of them."""


class Simulated(Protocol):
    """What a method's module says of itself, as far as its memory depends on it."""

    backbone: BackboneConfig
    tokenizer: PreTrainedTokenizerBase
    head: HeadConfig | None
    tokens_config: TokensConfig
    added_tokens: dict[str, int]
    peft_config: PeftConfig | None
    adapter: AdapterConfig | None
    optimizer_config: OptimizerConfig

    @property
    def rollout_shape(self) -> RolloutShape | None:
        """Responses that are sampled before a step."""

    @property
    def frozen_copy(self) -> FrozenCopy:
        """What is held a second time."""


@dataclass(frozen=True)
class Sharding:
    """How a step is spread over devices.

    Args:
        name: The strategy, as printed.
        devices: Devices that share.
        weights: Whether weights are split; likewise `gradients` and `optimizer`.
        gradients: Whether gradients are split.
        optimizer: Whether optimizer states are split.
        buckets: Whether gradients are copied into buckets for their reduction.
        sequence: Devices that share the tokens of a row.
        tensor: Devices that share the matrices of a layer.
    """

    name: str
    devices: int
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    buckets: bool = False
    sequence: int = 1
    tensor: int = 1


def asked_of(trainer: Trainer, strategy: Any) -> dict[str, Any]:
    """What a running Trainer was asked for, with what it has found out about the machine.

    Args:
        trainer: The Trainer.
        strategy: Its strategy as the configuration has it.
    """
    device = trainer.strategy.root_device.type
    return {
        "strategy": strategy,
        "devices": trainer.num_devices,
        "num_nodes": trainer.num_nodes,
        "precision": trainer.precision,
        "accelerator": "gpu" if device == "cuda" else device,
    }


def run_memory(
    module: Simulated,
    data: AlignmentDataModule,
    asked: Asked,
    trained_share: float,
    device_memory: float = USUAL_MEMORY,
) -> tuple[StepMemory, Workload]:
    """Memory of a step on one device, and the micro-batch it is of.

    Args:
        module: The method's module.
        data: Its data.
        asked: Settings of the Trainer: `precision` and `accelerator`.
        trained_share: Share of the tokens that the loss applies to.
        device_memory: Bytes of one device; the loss takes more logits at a time where a GPU has more.
    """
    precision = str(asked["precision"] or "32-true")
    kind = KINDS.get(precision.partition("-")[0])
    mixed = precision.endswith("mixed")
    length = data.encoding.max_length
    lengths: list[int] = []
    if data.packing:
        whole, rest = divmod(data.tokens_per_batch, length)
        lengths = [length] * whole + ([rest] if rest else [])
    workload = Workload(lengths, data.batch_size, length, trained_share, kind if mixed else None)
    if (shape := module.rollout_shape) is not None:
        workload = _with_responses(workload, shape, data)
    memory = step_memory(
        module.backbone,
        module.tokenizer,
        workload,
        head=module.head,
        tokens=module.tokens_config,
        added=module.added_tokens,
        peft=module.peft_config,
        adapter=module.adapter,
        dtype=None if mixed else kind,
        optimizer=module.optimizer_config,
        device_type="cuda" if _on_gpu(asked) else "cpu",
        device_memory=int(device_memory) if _on_gpu(asked) else None,
    )
    return memory.beside(module.frozen_copy, adapters=module.peft_config is not None), workload


def _with_responses(workload: Workload, shape: RolloutShape, data: AlignmentDataModule) -> Workload:
    """A micro-batch of the longest prompts with the longest responses, and what is generated together before it."""
    prompts, prompt, response = data.batch_size, data.encoding.max_length, shape.max_new_tokens
    rows, whole = prompts * shape.num_responses, prompt + response
    sampled = replace(workload, sampled=shape.together, sampled_length=whole)
    if not data.packing:
        return replace(sampled, rows=rows, width=whole)
    of_each = [prompt + shape.num_responses * response] if data.share_prompts else [whole] * shape.num_responses
    return replace(sampled, document_lengths=of_each * prompts)


def sharding_of(asked: Asked) -> Sharding:
    """What the configuration's strategy splits.

    Args:
        asked: Settings of the Trainer: `strategy`, `devices` and `num_nodes`.
    """
    strategy = asked["strategy"]
    name = strategy if isinstance(strategy, str) else str(strategy.class_path).rpartition(".")[2]
    settings: Any = {} if isinstance(strategy, str) else strategy.init_args
    devices = _count(asked["devices"]) * asked["num_nodes"]
    if name.startswith(("fsdp", "FSDP")):
        sequence, tensor = (int(settings.get(f"{kind}_parallel_size", 1)) for kind in ("sequence", "tensor"))
        return Sharding(name, devices, weights=True, gradients=True, optimizer=True, sequence=sequence, tensor=tensor)
    if name.lower().startswith("deepspeed"):
        stage = int(settings.get("stage", 2)) if settings else int(name.partition("stage_")[2][:1] or 2)
        return Sharding(f"{name} {stage}", devices, weights=stage == 3, gradients=stage >= 2, optimizer=stage >= 1)
    return Sharding(name, devices, buckets=devices > 1)


def _count(devices: int | str | list[int]) -> int:
    """Devices of a node; 1 where only the machine itself would know (`auto`, -1)."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def _on_gpu(asked: Asked) -> bool:
    return asked["accelerator"] in ("gpu", "cuda")


def per_device(memory: StepMemory, sharding: Sharding) -> dict[str, int]:
    """Bytes of each part on one device."""
    n = sharding.devices
    outside = memory.outside_layers * (sharding.tensor - 1) // max(n, sharding.tensor)  # whole beside sliced layers

    def split(size: int, is_split: bool) -> int:
        return math.ceil(size / n) if is_split and n > 1 else size

    parts = {
        "weights": split(memory.weights, sharding.weights) + outside,
        "gradients": split(memory.gradients, sharding.gradients),
        "optimizer": split(memory.optimizer, sharding.optimizer),
        "activations": memory.activations // sharding.sequence,
        "logits and loss": memory.loss,  # chunks of a fixed size, and the gradient of the output embedding
    }
    if memory.copied:
        parts["frozen copy"] = split(memory.copied, sharding.weights)
    if memory.temporary:
        parts["temporaries"] = memory.temporary // sharding.sequence
    step = sum(parts[name] for name in ("activations", "logits and loss")) + parts.get("temporaries", 0)
    if memory.keys_values > step:  # they are gone when a step begins
        parts["keys and values beyond these"] = memory.keys_values - step
    if sharding.weights and n > 1:  # the layer at work, the next one on its way, and what lies outside the layers
        gathered = 2 * memory.largest_layer // sharding.tensor
        parts["gathered weights"] = gathered + memory.outside_layers + memory.copied_outside
    if sharding.buckets:
        parts["buckets of gradients"] = memory.gradients
    return parts


def helpful_settings(parts: Mapping[str, int], module: Simulated, data: AlignmentDataModule, asked: Asked) -> list[str]:
    """The settings that save the most memory in a configuration, each with about what it saves, most first.

    Savings are rough shares of the parts, enough for their order.

    Args:
        parts: As of `per_device`.
        module: The method's module.
        data: Its data.
        asked: Settings of the Trainer.
    """
    step = parts["activations"] + parts.get("temporaries", 0)
    states = parts["gradients"] + parts["optimizer"] + parts.get("buckets of gradients", 0)
    sharding, backbone, gpu = sharding_of(asked), module.backbone, _on_gpu(asked)
    wrapped = module.peft_config is not None or module.adapter is not None
    saved = dict([_smaller_batch(data, step)])
    if backbone.checkpointing != "full":
        kept = 0.15 if backbone.checkpointing == "none" else 0.5
        saved["model.backbone.gradient_checkpointing: full"] = (1 - kept) * step
    elif gpu and not backbone.activation_offload:
        saved["model.backbone.activation_offload: true"] = 0.5 * parts["activations"]
    if gpu and str(asked["precision"] or "32-true").startswith("32"):
        saved["trainer.precision: bf16-mixed"] = 0.4 * step
    if not wrapped:
        saved["model.peft: a peft.LoraConfig, which trains a small part"] = 0.95 * states
    elif gpu and backbone.quantization == "none":
        saved["model.backbone.quantization: nf4"] = 0.7 * parts["weights"]
    if not sharding.weights:
        more = max(2, sharding.devices)
        saved[f"trainer.strategy: lit_alignment.FSDP2Strategy on {more} or more devices"] = (1 - 1 / more) * (
            parts["weights"] + states
        )
    else:
        saved[f"trainer.devices: more than {sharding.devices}"] = 0.5 * (parts["weights"] + states)
    most = sorted(saved, key=lambda setting: -saved[setting])[:NUM_ADVISED]
    return [f"{setting} (saves about {saved[setting] / GIB:.2g} GiB)" for setting in most]


def _smaller_batch(data: AlignmentDataModule, step: int) -> tuple[str, float]:
    """The setting that makes a micro-batch smaller, and the bytes of its activations that this saves."""
    tokens, length = data.tokens_per_batch, data.encoding.max_length
    if data.packing and tokens > length:
        fewer = max(length, tokens // 2)
        return f"data.tokens_per_batch: {fewer}, with more trainer.accumulate_grad_batches", (1 - fewer / tokens) * step
    if not data.packing and data.batch_size > 1:
        fewer = data.batch_size // 2
        setting = f"data.batch_size: {fewer}, with more trainer.accumulate_grad_batches"
        return setting, (1 - fewer / data.batch_size) * step
    also = " and data.tokens_per_batch" if data.packing else ""
    return f"data.encoding.max_length{also}: {max(1, length // 2)}", step / 2


def out_of_memory(module: Simulated, data: AlignmentDataModule, asked: Asked, said: str) -> str:
    """What to say where a device has no memory left: what was expected of each part, and what helps.

    Args:
        module: The method's module.
        data: Its data.
        asked: Settings of the Trainer.
        said: What the allocator said.
    """
    text = f"out of memory ({said.splitlines()[0].rstrip('.')[:300]}). "
    try:
        total = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else USUAL_MEMORY
        memory, _ = run_memory(module, data, asked, 1.0, total)
        parts = per_device(memory, sharding_of(asked))
        helpful = helpful_settings(parts, module, data, asked)
    except Exception as error:  # whatever a simulation stumbles over, it must not hide why the run has ended
        return f"{text}`lit-alignment estimate` cannot say why ({type(error).__name__}: {error}). Use smaller batches."
    sizes = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items())
    advised = "; ".join(f"({number}) {setting}" for number, setting in enumerate(helpful, 1))
    return (
        f"{text}`lit-alignment estimate` predicts, in GiB on each device: {sizes}; {sum(parts.values()) / GIB:.3g} in "
        f"all. What helps most here: {advised}. The callback lit_alignment.MemorySnapshot shows what held the memory."
    )
