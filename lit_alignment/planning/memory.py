"""Memory of a training step, from a simulated one: tensors with shapes and no data.

B rows, T tokens, N trained positions
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, PreTrainedTokenizerBase

from lit_alignment.losses.chunks import chunk_within
from lit_alignment.models.adapters import AdapterConfig, is_prompt_learning
from lit_alignment.models.attention import Attention, document_arguments
from lit_alignment.models.head import base_model, head_loss, hidden_states, scores_at
from lit_alignment.models.layers import decoder_layers
from lit_alignment.models.loading import BackboneConfig, HeadConfig, load_network
from lit_alignment.models.reference import FrozenCopy
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.planning.optimizer_state import state_bytes

# Bytes a weight; nf4 has 4 bits and, with double quantisation, 0.127 bits of scales (arXiv:2305.14314, section 3).
QUANTISED_BYTES = {"nf4": 4.127 / 8, "int8": 1.0}


@dataclass(frozen=True)
class Workload:
    """One micro-batch.

    Args:
        document_lengths: Lengths of the documents of a packed row; empty for a padded batch.
        rows: Rows of a padded batch.
        width: Tokens of a padded row.
        trained: Share of the tokens that the loss applies to.
        autocast: Precision of the computation, where it is not that of the weights.
        sampled: Sequences that are generated together before the step.
        sampled_length: Tokens of each, with its prompt.
    """

    document_lengths: list[int]
    rows: int = 1
    width: int = 0
    trained: float = 1.0
    autocast: torch.dtype | None = None
    sampled: int = 0
    sampled_length: int = 0


@dataclass(frozen=True)
class RolloutShape:
    """Responses that a training samples before its optimizer steps.

    Args:
        num_responses: To each prompt.
        max_new_tokens: Tokens of the longest.
        together: Responses that the network generates at a time, whose keys and values it holds; 0 if it does not.
    """

    num_responses: int
    max_new_tokens: int
    together: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step holds at its peak, by part.

    Args:
        parameters: Number of parameters.
        trainable: Number of trainable parameters.
        weights: Weights and buffers.
        gradients: Gradients; Lightning keeps those of the last step through the forward pass.
        optimizer: States of the optimizer.
        activations: What the forward pass keeps for the backward pass, up to the last hidden states.
        loss: What the loss adds: chunks of logits, and the gradients that it makes at once.
        temporary: What the backward pass needs beyond these, if its peak is the higher one.
        largest_layer: Weights of the largest decoder layer, which sharding gathers.
        outside_layers: Weights outside of the decoder layers, which sharding keeps gathered.
        copied: Weights of what a method holds a second time, frozen.
        copied_outside: Of these what lies outside of the decoder layers.
        keys_values: Keys and values of the responses that are generated together before a step: when there are no
            activations, and the gradients of the last step still exist.
        offloaded: Activations that the host's memory holds instead.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    temporary: int
    largest_layer: int
    outside_layers: int
    copied: int = 0
    copied_outside: int = 0
    keys_values: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak on one device that holds everything: in a step, or while responses are generated."""
        kept = self.weights + self.gradients + self.optimizer + self.copied
        return kept + max(self.activations + self.loss + self.temporary, self.keys_values)

    def beside(self, copy: FrozenCopy, adapters: bool) -> "StepMemory":
        """The same with what is held a second time.

        Args:
            copy: Of the language model what.
            adapters: Whether the trainable weights are those of adapters, which a copy of the model does not have.
        """
        match copy:
            case "model":
                own = self.weights - (self.gradients if adapters else 0)  # a gradient is as large as its weight
                return replace(self, copied=own, copied_outside=self.outside_layers)
            case "adapter":
                return replace(self, copied=self.gradients)
            case _:
                return self


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that exist, and the most there were."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.see, out)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.current -= size

    @contextmanager
    def highest(self) -> Iterator[list[int]]:
        """The highest level inside the block, as the one element of the list after it."""
        found: list[int] = []
        before, self.peak = self.peak, self.current
        yield found
        found.append(self.peak)
        self.peak = max(before, self.peak)


def step_memory(
    backbone: BackboneConfig,
    tokenizer: PreTrainedTokenizerBase,
    workload: Workload,
    *,
    head: HeadConfig | None = None,
    tokens: TokensConfig,
    added: dict[str, int],
    peft: PeftConfig | None,
    adapter: AdapterConfig | None,
    dtype: torch.dtype | None = None,
    device_type: str = "cpu",
    device_memory: int | None = None,
    optimizer: OptimizerConfig | None = None,
) -> StepMemory:
    """Memory of the second training step, when gradients and optimizer states exist.

    Args:
        backbone: The model; only its configuration is read.
        tokenizer: Its tokenizer.
        workload: The micro-batch.
        head: What scores, if it is no language model.
        tokens: New tokens.
        added: Ids of new tokens.
        peft: New adapters.
        adapter: An existing adapter, whose configuration stands for its weights.
        dtype: Precision of all weights, where the Trainer's precision sets it.
        device_type: Where it is to run, which decides what `auto` settings mean.
        device_memory: Bytes of a GPU, whose free part decides how many logits exist at a time; None on a CPU.
        optimizer: The optimizer; None is the usual one.
    """
    if adapter is not None:
        peft = adapter.peft()
    attention: Attention = "eager" if backbone.attention == "eager" else "sdpa"  # all others keep as little
    with torch.device("meta"):
        network = load_network(
            replace(backbone, weights="random", attention=attention, quantization="none", liger=False, compile=False),
            tokenizer,
            head=head,
            tokens=replace(tokens, new={token: NewTokenConfig() for token in tokens.new}),
            added=added,
            peft=None if peft is None else _without_data(peft),
            packing=bool(workload.document_lengths),
            device_type=device_type,
        )
    if dtype is not None:
        network.to(dtype)
    if isinstance(network, PeftModel) and is_prompt_learning(network):  # indices that are no buffer
        network.prompt_tokens = {name: torch.arange(len(t)) for name, t in network.prompt_tokens.items()}
    # Kernels are chosen by device: on `meta` attention would be the one that stores its matrix.
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        base_model(network).tie_weights()
        memory = _simulate(network, workload, device_memory)
    if backbone.layers.offload:
        memory = _offloaded(memory, network, workload)
    memory = replace(memory, optimizer=state_bytes(network, optimizer or OptimizerConfig()))
    return memory if backbone.quantization == "none" else _quantised(memory, network, backbone)


def _without_data(peft: PeftConfig) -> PeftConfig:
    """The same adapters with a start that needs no weights or texts."""
    changed = peft.to_dict()
    if isinstance(peft, LoraConfig):
        changed["init_lora_weights"] = True
    if isinstance(peft, PromptTuningConfig):
        changed["prompt_tuning_init"] = PromptTuningInit.RANDOM
    return PeftConfig.from_peft_type(**changed)


def _simulate(network: nn.Module, workload: Workload, device_memory: int | None) -> StepMemory:
    memory = LiveMemory()
    parameters = list(network.parameters())
    for tensor in [*parameters, *network.buffers()]:
        memory.see(tensor)
    weights = memory.current
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    for parameter in parameters:  # of the step before
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        if parameter.grad is not None:
            memory.see(parameter.grad)
    with memory:
        with memory.highest() as forward_peak:
            # What is free is asked for in the first step, when there are neither gradients nor states of the optimizer.
            usable = None if device_memory is None else device_memory + gradients
            loss, activations, logits = _forward(network, workload, memory, usable)
        network.zero_grad()
        with memory.highest() as backward_peak:
            _backward(loss)
        del loss
        keys_values = _keys_and_values(network, workload, memory) if workload.sampled else 0
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in _layers(network)]
    return StepMemory(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights=weights,
        gradients=gradients,
        optimizer=0,  # counted elsewhere: a simulated step has no values
        activations=activations - weights - gradients,
        loss=logits,
        temporary=max(0, max(forward_peak[0], backward_peak[0]) - activations - logits),
        largest_layer=max(layers),
        outside_layers=weights - sum(layers),
        keys_values=keys_values,
    )


def _offloaded(memory: StepMemory, network: nn.Module, workload: Workload) -> StepMemory:
    """The same with the inputs of the decoder layers in the host's memory, but for that of the layer at work.

    Layers hand on hidden states in the precision of the weights; under autocast the embeddings keep theirs, too.
    """
    tokens = sum(workload.document_lengths) or workload.rows * workload.width
    embedding = base_model(network).get_input_embeddings().weight
    moved = (len(_layers(network)) - 1) * tokens * embedding.shape[1] * embedding.element_size()
    return replace(memory, activations=memory.activations - moved, offloaded=moved)


def _quantised(memory: StepMemory, network: nn.Module, backbone: BackboneConfig) -> StepMemory:
    """The same with the frozen linear weights of the decoder layers held in 4 or 8 bits."""
    layers = _layers(network)
    frozen = [
        module.weight
        for layer in layers
        for module in layer.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    saved = sum(weight.numel() * (weight.element_size() - QUANTISED_BYTES[backbone.quantization]) for weight in frozen)
    layer = memory.largest_layer - int(saved / len(layers))
    return replace(memory, weights=memory.weights - int(saved), largest_layer=layer)


def _layers(network: nn.Module) -> list[nn.Module]:
    return decoder_layers(base_model(network))


def _forward(network: nn.Module, workload: Workload, memory: LiveMemory, usable: int | None) -> tuple[Tensor, int, int]:
    """Loss of a micro-batch, bytes that exist before the loss, and the most that the loss adds."""
    inputs = _inputs(network, workload)
    num_trained = max(1, math.floor(workload.trained * inputs["input_ids"].numel()))
    context = nullcontext() if workload.autocast is None else torch.autocast("cpu", workload.autocast)
    with context:
        if base_model(network).get_output_embeddings() is None:
            scores = scores_at(network, torch.zeros(num_trained, dtype=torch.long), **inputs)
            return scores.sum(), memory.current, 0
        hidden = hidden_states(network, **inputs)
        trained = hidden.flatten(0, 1)[:num_trained].clone()
        before = memory.current
        targets, ones = torch.zeros(num_trained, dtype=torch.long), torch.ones(num_trained)
        vocabulary = base_model(network).config.get_text_config().vocab_size
        chunk = None if usable is None else chunk_within(max(0, usable - before), vocabulary)
        with memory.highest() as peak:
            loss, _ = head_loss(network, trained, targets, ones, chunk_size=chunk)
    return loss, before, peak[0] - before


@torch.no_grad()
def _keys_and_values(network: nn.Module, workload: Workload, memory: LiveMemory) -> int:
    """Bytes of the keys and values of all sequences that are generated together, at their full length."""
    model = base_model(network)
    before, cache = memory.current, DynamicCache(config=model.config)
    context = nullcontext() if workload.autocast is None else torch.autocast("cpu", workload.autocast)
    with context:
        inputs = {"input_ids": torch.zeros(1, workload.sampled_length, dtype=torch.long)}
        hidden_states(model, **inputs, past_key_values=cache, use_cache=True)
        del inputs
    return workload.sampled * (memory.current - before)


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _inputs(network: nn.Module, workload: Workload) -> dict[str, Any]:
    lengths = workload.document_lengths
    if lengths:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        arguments = document_arguments(base_model(network).config._attn_implementation, lengths, positions.device)
        return {"input_ids": torch.zeros(1, sum(lengths), dtype=torch.long), "position_ids": positions, **arguments}
    shape = (workload.rows, workload.width)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)}
    if not is_prompt_learning(network):
        inputs["position_ids"] = torch.arange(workload.width).expand(shape)
    return inputs
