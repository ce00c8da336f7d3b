"""A training step on many devices, on paper: memory, bytes sent, and time, from a simulated step and given speeds."""

from dataclasses import dataclass

from lit_alignment.planning.memory import StepMemory


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
class Sharing:
    """Neighbouring devices that work on the same micro-batch.

    Args:
        sequence: Devices that share the tokens of a row.
        tensor: Devices that share the matrices of a layer.
        bytes_per_token: What a device sends to the others of these for each token of the row.
    """

    sequence: int = 1
    tensor: int = 1
    bytes_per_token: float = 0.0


@dataclass(frozen=True)
class ScalePoint:
    """A step of FSDP2 on a number of devices.

    Args:
        devices: The number.
        memory: Bytes that a device holds at its peak.
        gathered: Bytes of weights that a device receives in a micro-batch.
        scattered: Bytes of gradients that it sends.
        exchanged: Bytes of activations, and of their gradients, that it sends to those that share its micro-batch.
        compute: Seconds of computing.
        communication: Seconds of communication, most of which hides behind computing.
        seconds: Seconds of the micro-batch.
        tokens_per_second: Of all devices together.
    """

    devices: int
    memory: int
    gathered: int
    scattered: int
    exchanged: int
    compute: float
    communication: float
    seconds: float
    tokens_per_second: float


def fsdp_traffic(memory: StepMemory, devices: int, gathered_share: float = 1.0, tensor: int = 1) -> tuple[int, int]:
    """Bytes that a device receives and sends in a micro-batch under FSDP2.

    Decoder layers are gathered twice, for the forward and the backward pass, and what lies outside of them once; a
    device has its own part of all already. Gradients are summed in float32, and a device keeps its part.

    Args:
        memory: Of a step on one device.
        devices: Their number.
        gathered_share: Size of gathered weights, as a share of the stored ones: 0.5 for bfloat16 of float32.
        tensor: Devices that share the matrices of a layer, of which each gathers and scatters its own slice.

    Source: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 7.
    """
    share = (devices // tensor - 1) / (devices // tensor)
    layers = (memory.weights - memory.outside_layers) / tensor
    gathered = (2 * layers + memory.outside_layers) * share * gathered_share
    outside = memory.outside_layers / memory.weights  # of gradients as of weights
    return round(gathered), round(memory.gradients * share * ((1 - outside) / tensor + outside))


def sequence_bytes_per_token(
    layers: int, width: int, key_width: int, size: int, element: int, passes: int = 2
) -> float:
    """Bytes that a device sends for each token of a row in sequence parallelism.

    Queries, keys and values are exchanged for heads, and outputs for tokens; a device has 1 / size of the tokens.

    Args:
        layers: Decoder layers.
        width: Of all query heads together.
        key_width: Of all key heads together, after repeating them.
        size: Devices that share a row.
        element: Bytes of a number.
        passes: 2 for forward and backward; 3 if activations are recomputed.
    """
    return passes * layers * 2 * (width + key_width) * element * (size - 1) / size / size


def tensor_bytes_per_token(layers: int, width: int, sums: int, size: int, element: int) -> float:
    """Bytes that a device sends for each token in tensor parallelism, where a sum sends each number twice.

    Args:
        layers: Decoder layers.
        width: Of the hidden states.
        sums: In each layer: outputs of row-wise matrices forward, and inputs of column-wise ones backward.
        size: Devices that share a layer.
        element: Bytes of a number.
    """
    return layers * sums * 2 * width * element * (size - 1) / size


def scale_point(
    memory: StepMemory,
    flops_per_token: float,
    tokens: int,
    cluster: Cluster,
    devices: int,
    gathered_share: float = 1.0,
    sharing: Sharing = Sharing(),
) -> ScalePoint:
    """A micro-batch of FSDP2 on a number of devices.

    The next layer is gathered while one is computed, so the longer of the two decides; the first layer waits, and so
    does all computing for what is exchanged inside a layer. Memory is an upper bound for tensor parallelism:
    activations between the matrices of a layer, which are split too, are counted whole.

    Args:
        memory: Of a step on one device.
        flops_per_token: Floating-point operations to train a token.
        tokens: Of a micro-batch, which may be shared.
        cluster: Speeds.
        devices: Their number.
        gathered_share: As of `fsdp_traffic`.
        sharing: Devices that work on one micro-batch.
    """
    together = sharing.sequence * sharing.tensor
    gathered, scattered = fsdp_traffic(memory, devices, gathered_share, sharing.tensor)
    exchanged = round(tokens * sharing.bytes_per_token)
    bandwidth = cluster.link if devices <= cluster.per_node else cluster.network
    within = cluster.link if together <= cluster.per_node else cluster.network
    compute = tokens * flops_per_token / together / cluster.flops
    communication = (gathered + scattered) / bandwidth + exchanged / within
    first = memory.largest_layer / sharing.tensor * gathered_share / bandwidth if devices > 1 else 0.0
    seconds = max(compute, (gathered + scattered) / bandwidth) + first + exchanged / within
    states = (memory.weights + memory.gradients + memory.optimizer + memory.copied) / devices
    states += memory.outside_layers * (sharing.tensor - 1) / devices  # what lies outside of layers is not sliced
    working = (memory.activations + memory.temporary) / sharing.sequence + memory.loss
    if devices > 1:  # the layer at work, the next one, and what stays gathered
        outside = memory.outside_layers + memory.copied_outside
        working += (2 * memory.largest_layer / sharing.tensor + outside) * gathered_share
    total = round(states + working)
    rate = devices / together * tokens / seconds
    return ScalePoint(devices, total, gathered, scattered, exchanged, compute, communication, seconds, rate)


def attention_flops_per_token(layers: int, width: int, length: int) -> float:
    """Operations of the causal attention scores to train a token: forward, and twice that backward.

    Args:
        layers: Decoder layers.
        width: Width of all heads together.
        length: Tokens that attend to each other.
    """
    return 3 * layers * 2 * 2 * width * length / 2
