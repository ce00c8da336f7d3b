"""`lit-alignment estimate`: parameters and memory per device of a training configuration, before a launch."""

import argparse
import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from lit_alignment.distributed.tensor_parallel import layer_plan
from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import decoder_flops_per_token, from_pretrained
from lit_alignment.planning.memory import StepMemory, Workload
from lit_alignment.planning.run import (
    GIB,
    USUAL_MEMORY,
    Sharding,
    helpful_settings,
    per_device,
    run_memory,
    sharding_of,
)
from lit_alignment.planning.scaling import (
    Cluster,
    Sharing,
    attention_flops_per_token,
    scale_point,
    sequence_bytes_per_token,
    tensor_bytes_per_token,
)
from lit_alignment.tools import parsers
from lit_alignment.trainer_cli import ToolCLI, build_for_tool

CONTEXT = 1.0  # GiB that a CUDA context and the libraries' workspaces take beside tensors


def main(arguments: list[str]) -> None:
    """Print parameters, memory by part, and whether it fits."""
    options, rest = parsers.estimate().split(arguments)
    cli = build_for_tool(rest)
    size = USUAL_MEMORY if options.memory is None else options.memory * GIB
    memory, workload = run_memory(cli.model, cli.datamodule, cli.asked, options.trained_share, size)
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
    if memory.offloaded:
        moved = memory.offloaded / sharding.sequence / GIB
        console.print(f"in the host's memory: {moved:.3f} GiB of activations")
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
        console.print(f"{verdict} into {options.memory:g} GiB ({total / options.memory:.0%})")
        if total > options.memory:
            console.print("what helps most:")
            for setting in helpful_settings(parts, cli.model, cli.datamodule, cli.asked):
                console.print(f"  {setting}", highlight=False)


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
    sharing = _sharing(sharding, config, mixed, cli.model.backbone.checkpointing != "none")
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
