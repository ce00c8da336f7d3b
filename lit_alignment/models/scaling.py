"""A training step on many devices, on paper: memory, bytes sent, and time, from a simulated step and given speeds."""

from dataclasses import dataclass

from lit_alignment.models.memory import StepMemory


@dataclass(frozen=True)
class Cluster:
    """Speeds of the machines.

    Args:
        per_node: Devices of a node.
        flops: What a device reaches in matrix products, a second.
        link: Bytes a second that a device sends to others of its node.
        network: Bytes a second that a device sends to other nodes.
    """

    per_node: int
    flops: float
    link: float
    network: float


@dataclass(frozen=True)
class ScalePoint:
    """A step of FSDP2 on a number of devices.

    Args:
        devices: The number.
        memory: Bytes that a device holds at its peak.
        gathered: Bytes of weights that a device receives in a micro-batch.
        scattered: Bytes of gradients that it sends.
        compute: Seconds of computing.
        communication: Seconds of communication, most of which hides behind computing.
        seconds: Seconds of the micro-batch.
        tokens_per_second: Of all devices together.
    """

    devices: int
    memory: int
    gathered: int
    scattered: int
    compute: float
    communication: float
    seconds: float
    tokens_per_second: float


def fsdp_traffic(memory: StepMemory, devices: int, gathered_share: float = 1.0) -> tuple[int, int]:
    """Bytes that a device receives and sends in a micro-batch under FSDP2.

    Decoder layers are gathered twice, for the forward and the backward pass, and what lies outside of them once; a
    device has its own part of all already. Gradients are summed in float32, and a device keeps its part.

    Args:
        memory: Of a step on one device.
        devices: Their number.
        gathered_share: Size of gathered weights, as a share of the stored ones: 0.5 for bfloat16 of float32.

    Source: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 7.
    """
    share = (devices - 1) / devices
    layers = memory.weights - memory.outside_layers
    gathered = (2 * layers + memory.outside_layers) * share * gathered_share
    return round(gathered), round(memory.gradients * share)


def scale_point(
    memory: StepMemory, flops_per_token: float, tokens: int, cluster: Cluster, devices: int, gathered_share: float = 1.0
) -> ScalePoint:
    """A micro-batch of FSDP2 on a number of devices.

    The next layer is gathered while one is computed, so the longer of the two decides; the first layer waits.

    Args:
        memory: Of a step on one device.
        flops_per_token: Floating-point operations to train a token.
        tokens: Of a device's micro-batch.
        cluster: Speeds.
        devices: Their number.
        gathered_share: As of `fsdp_traffic`.
    """
    gathered, scattered = fsdp_traffic(memory, devices, gathered_share)
    bandwidth = cluster.link if devices <= cluster.per_node else cluster.network
    compute = tokens * flops_per_token / cluster.flops
    communication = (gathered + scattered) / bandwidth
    first = memory.largest_layer * gathered_share / bandwidth if devices > 1 else 0.0
    seconds = max(compute, communication) + first
    states = (memory.weights + memory.gradients + memory.optimizer) / devices
    working = memory.activations + memory.loss + memory.temporary
    if devices > 1:  # the layer at work, the next one, and what stays gathered
        working += round((2 * memory.largest_layer + memory.outside_layers) * gathered_share)
    total = round(states + working)
    rate = devices * tokens / seconds
    return ScalePoint(devices, total, gathered, scattered, compute, communication, seconds, rate)


def attention_flops_per_token(layers: int, width: int, length: int) -> float:
    """Operations of the causal attention scores to train a token: forward, and twice that backward.

    Args:
        layers: Decoder layers.
        width: Width of all heads together.
        length: Tokens that attend to each other.
    """
    return 3 * layers * 2 * 2 * width * length / 2
