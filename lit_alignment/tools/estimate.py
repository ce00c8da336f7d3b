"""`lit-alignment estimate`: parameters and memory per device of a training configuration, before a launch."""

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.distributed.tensor_parallel import layer_plan
from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import decoder_flops_per_token, from_pretrained
from lit_alignment.planning.memory import RolloutShape, StepMemory, Workload, step_memory
from lit_alignment.planning.scaling import (
    Cluster,
    Sharing,
    attention_flops_per_token,
    scale_point,
    sequence_bytes_per_token,
    tensor_bytes_per_token,
)
from lit_alignment.tools.options import OptionParser, positive, whole
from lit_alignment.trainer_cli import ToolCLI, build_for_tool

GIB = 2**30
CONTEXT = 1.0  # GiB that a CUDA context and the libraries' workspaces take beside tensors


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


def main(arguments: list[str]) -> None:
    """Print parameters, memory by part, and whether it fits."""
    parser = OptionParser(
        prog="lit-alignment estimate",
        description="Memory per device of a training step. The step is simulated with tensors that have shapes and no "
        "data, so it needs neither the weights nor the device. Takes the options of fit: --config, and any setting.",
    )
    parser.add_argument("--memory", type=positive(), help="GiB of one device: say whether it fits")
    parser.add_argument("--trained-share", type=positive(1), default=1.0, help="share of trained tokens (default: all)")
    parser.add_argument("--scale", help="also FSDP2 on these numbers of devices, such as 8,64,1024")
    parser.add_argument(
        "--tflops", type=positive(), default=989, help="of a device in bfloat16 (default: 989, an H100)"
    )
    parser.add_argument(
        "--utilization", type=positive(1), default=0.4, help="share of these that is reached (default: 0.4)"
    )
    parser.add_argument("--per-node", type=whole(1), default=8, help="devices of a node (default: 8)")
    parser.add_argument("--link", type=positive(), default=450, help="GB/s of a device within its node (default: 450)")
    parser.add_argument("--network", type=positive(), default=50, help="GB/s of a device to other nodes (default: 50)")
    options, rest = parser.split(arguments)
    cli = build_for_tool(rest)
    memory, workload = estimate(cli, options.trained_share)
    sharding = sharding_of(cli.asked)
    parts = per_device(memory, sharding)
    console = Console(soft_wrap=True)
    share = memory.trainable / memory.parameters
    console.print(f"parameters: {memory.parameters:,}, trainable {memory.trainable:,} ({share:.2%})")
    shared = sharding.sequence * sharding.tensor
    each = f", shared by {shared}" if shared > 1 else ""
    console.print(f"micro-batch: {_described(workload)}{each}; {sharding.name} over {sharding.devices} device(s)")
    if cli.model.beside:
        console.print(f"of the language model alone: {cli.model.beside} come on top")
    if workload.sampled:
        console.print(
            f"before a step {workload.sampled} responses are generated together, of up to {workload.sampled_length} "
            f"tokens with their prompts: {memory.keys_values / GIB:.3f} GiB of keys and values, which are gone when "
            "activations come"
        )
    console.print(_table(parts))
    total = sum(parts.values()) / GIB
    on_gpu = cli.asked["accelerator"] in ("gpu", "cuda")
    if on_gpu:
        total += CONTEXT
        console.print(f"with {CONTEXT:g} GiB for the CUDA context: {total:.2f} GiB")
    if options.scale:
        console.print(_scale(options, cli, memory, workload, sharding))
    if options.memory is not None:
        verdict = "fits" if total <= options.memory else "does not fit"
        advice = "" if total <= options.memory else f". {advice_for(parts, cli)}"
        console.print(f"{verdict} into {options.memory:g} GiB ({total / options.memory:.0%}){advice}")


def _scale(
    options: argparse.Namespace, cli: ToolCLI, memory: StepMemory, workload: Workload, sharding: Sharding
) -> Table:
    """FSDP2 on several numbers of devices.

    Raises:
        ConfigError: If these are not numbers, or devices that share a micro-batch do not divide them.
    """
    try:
        counts = [int(each) for each in options.scale.split(",")]
    except ValueError as error:
        raise ConfigError(f"--scale {options.scale}: give numbers of devices, such as 8,64,1024.") from error
    config = from_pretrained(AutoConfig, cli.model.backbone, cli.model.backbone.path).get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    length = workload.document_lengths[0] if workload.document_lengths else workload.width
    flops = decoder_flops_per_token(config, memory.parameters, memory.trainable)
    flops += attention_flops_per_token(config.num_hidden_layers, width, length)
    cluster = Cluster(
        options.per_node, options.tflops * 1e12 * options.utilization, options.link * 1e9, options.network * 1e9
    )
    mixed = str(cli.asked["precision"]).endswith("mixed")  # then weights are gathered in two bytes each
    share = min(1.0, 2 * memory.parameters / memory.weights) if mixed else 1.0
    tokens = sum(workload.document_lengths) or workload.rows * workload.width
    sharing = _sharing(sharding, config, mixed, cli.model.backbone.gradient_checkpointing)
    together = sharing.sequence * sharing.tensor
    if any(count % together for count in counts):
        raise ConfigError(f"--scale {options.scale}: {together} devices share a micro-batch; give multiples of that.")
    of = "" if together == 1 else f" of {together} devices"
    title = f"FSDP2, {tokens} tokens a micro-batch{of}, {flops / 1e9:.1f} GFLOP a token"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # has to fit into 80 columns
    for heading in ("devices", "GiB each", "GiB got", "GiB sent", "s work", "s network", "s", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for devices in counts:
        point = scale_point(memory, flops, tokens, cluster, devices, share, sharing)
        sizes = [f"{size / GIB:.2f}" for size in (point.memory, point.gathered, point.scattered + point.exchanged)]
        times = [f"{each:.3f}" for each in (point.compute, point.communication, point.seconds)]
        table.add_row(str(devices), *sizes, *times, f"{point.tokens_per_second:,.0f}")
    return table


def _sharing(sharding: Sharding, config: PretrainedConfig, mixed: bool, recomputed: bool) -> Sharing:
    """What devices that share a micro-batch send to each other."""
    heads, layers, element = config.num_attention_heads, config.num_hidden_layers, 2 if mixed else 4
    each = getattr(config, "head_dim", None) or config.hidden_size // heads
    sent = 0.0
    if sharding.sequence > 1:
        keys = math.lcm(config.num_key_value_heads, sharding.sequence) * each
        passes = 3 if recomputed else 2
        sent = sequence_bytes_per_token(layers, heads * each, keys, sharding.sequence, element, passes)
    if sharding.tensor > 1:
        sums = len(layer_plan(config, sharding.tensor))
        sent = tensor_bytes_per_token(layers, config.hidden_size, sums, sharding.tensor, element)
    return Sharing(sharding.sequence, sharding.tensor, sent)


def estimate(cli: ToolCLI, trained_share: float) -> tuple[StepMemory, Workload]:
    """Memory of a step on one device, and the micro-batch it is of."""
    module, data = cli.model, cli.datamodule
    precision = str(cli.asked["precision"] or "32-true")
    kinds = {"bf16": torch.bfloat16, "16": torch.float16}
    kind = kinds.get(precision.partition("-")[0])
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
        device_type="cuda" if cli.asked["accelerator"] in ("gpu", "cuda") else "cpu",
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


def sharding_of(asked: Any) -> Sharding:
    """What the configuration's strategy splits."""
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


def advice_for(parts: dict[str, int], cli: ToolCLI) -> str:
    """What to change first."""
    largest = max(parts, key=lambda name: parts[name])
    if largest in ("activations", "temporaries"):
        if not cli.model.backbone.gradient_checkpointing:
            return "Most are activations: set model.backbone.gradient_checkpointing to true."
        return "Most are activations: lower data.tokens_per_batch or data.batch_size, and accumulate more."
    if largest == "logits and loss":
        return "Most is the loss: with new tokens or full training its gradient is as large as the output embedding."
    if cli.model.peft_config is None and cli.model.adapter is None:
        return "Most are weights and their states: set model.peft, or shard over more devices (FSDP2)."
    return "Most are weights: set model.backbone.quantization to nf4, or shard over more devices (FSDP2)."


def _described(workload: Workload) -> str:
    if workload.document_lengths:
        return f"one packed row of {sum(workload.document_lengths)} tokens"
    return f"{workload.rows} rows of {workload.width} tokens"


def _table(parts: dict[str, int]) -> Table:
    table = Table("part", "GiB per device", "share", "")
    total = sum(parts.values())
    for name, size in parts.items():
        table.add_row(name, f"{size / GIB:.3f}", f"{size / total:.0%}", "█" * round(30 * size / total))
    table.add_section()
    table.add_row("total", f"{total / GIB:.3f}", "", "")
    return table
