"""Log-probabilities of the tokens of responses, for every method that needs them.

N targets, D width, V vocabulary
"""

from typing import Any, Literal, overload

from torch import Tensor, nn

from lit_alignment.data.batching.collate import Rows, TargetBatch, local_positions
from lit_alignment.models.attention import MASKED, document_arguments
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.head import (
    base_model,
    hidden_states,
    router_weight,
    token_logps,
    token_logps_with_entropies,
)


@overload
def target_logps(
    network: nn.Module,
    batch: TargetBatch,
    *,
    temperature: float = 1.0,
    with_entropy: Literal[False] = False,
    sequence: SequenceGroup | None = None,
) -> Tensor: ...


@overload
def target_logps(
    network: nn.Module,
    batch: TargetBatch,
    *,
    temperature: float = 1.0,
    with_entropy: Literal[True],
    sequence: SequenceGroup | None = None,
) -> tuple[Tensor, Tensor]: ...


def target_logps(
    network: nn.Module,
    batch: TargetBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    sequence: SequenceGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target of a batch, with gradient; never are there logits of all of them, [N, V].

    The sum over a response is that of its part, `torch.split(logps, batch.lengths)`.

    Args:
        network: A causal language model, with or without adapters, sharded or not.
        batch: The rows and their targets, on any device.
        temperature: Divides the logits, as in sampling.
        with_entropy: Also return the entropy of the distribution that each target is drawn from.
        sequence: Ranks that share the batch's row; each computes its slice, and all get all log-probabilities.

    Returns:
        Nats, fp32 at least, [N]; with `with_entropy` these and the entropies, [N].
    """
    hidden = hidden_at_targets(network, batch, sequence)  # [n, D]
    targets = of_this_rank(batch.targets, batch, sequence).to(hidden.device, non_blocking=True)
    if with_entropy:
        found = token_logps_with_entropies(network, hidden, targets, temperature)
        return _of_all_ranks(found[0], batch, sequence), _of_all_ranks(found[1], batch, sequence)
    return _of_all_ranks(token_logps(network, hidden, targets, temperature), batch, sequence)


def hidden_at_targets(network: nn.Module, batch: TargetBatch, sequence: SequenceGroup | None = None) -> Tensor:
    """Hidden states that predict a batch's targets, [N, D]; of this rank's alone where ranks share the row.

    Args:
        network: A causal language model.
        batch: The rows and their targets.
        sequence: Ranks that share the row.
    """
    hidden = hidden_states(network, **row_inputs(network, batch, sequence)).flatten(0, 1)
    read_at = of_this_rank(batch.read_at, batch, sequence).to(hidden.device, non_blocking=True)
    start = 0 if sequence is None else sequence.own(batch.input_ids.shape[1]).start
    return hidden.index_select(0, read_at - start)


def of_this_rank(values: Tensor, batch: TargetBatch, sequence: SequenceGroup | None) -> Tensor:
    """What belongs to the targets in this rank's slice of the row, of one value for each target, [N] to [n]."""
    return values if sequence is None else values.index_select(0, _local(batch, sequence).to(values.device))


def _of_all_ranks(values: Tensor, batch: TargetBatch, sequence: SequenceGroup | None) -> Tensor:
    """One value for each target of the row, [n] to [N], from the ranks that share it; gradients go back to each."""
    if sequence is None:
        return values
    local = _local(batch, sequence).to(values.device)
    return sequence.sum(values.new_zeros(batch.num_trained).index_copy(0, local, values))


def _local(batch: TargetBatch, sequence: SequenceGroup) -> Tensor:
    if batch.local is not None:
        return batch.local
    return local_positions(batch.read_at, sequence.own(batch.input_ids.shape[1]))


def row_inputs(network: nn.Module, batch: Rows, sequence: SequenceGroup | None = None) -> dict[str, Any]:
    """What a forward pass over a batch's rows is given, on the network's device.

    Args:
        network: A transformers model, with or without adapters.
        batch: The rows.
        sequence: Ranks that share the row, of which each gets its slice.
    """
    device = next(network.parameters()).device
    implementation = base_model(network).config._attn_implementation
    own = slice(None) if sequence is None else sequence.own(batch.input_ids.shape[1])
    # Padding stands on the right, where causal attention does not see it; a router's loss counts the other tokens.
    # Without a mask kernels skip the upper half, and nobody looks whether there is padding, for which a GPU is waited.
    mask = batch.attention_mask if implementation in MASKED or router_weight(network) else None
    return {
        "input_ids": batch.input_ids[:, own].to(device, non_blocking=True),
        "attention_mask": None if mask is None else mask.to(device, non_blocking=True),
        "position_ids": batch.position_ids[:, own].to(device, non_blocking=True),
        **document_arguments(implementation, batch.document_lengths, device, batch.document_parents, sequence),
    }
