"""Features of images merged into the token embeddings, in any transformers model.

B rows, T tokens, N images, Q embeddings of an image, D width
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_alignment.models.head import base_model


@dataclass(frozen=True)
class Placement:
    """What stands at the placeholders of one kind.

    Args:
        token_id: The placeholder.
        embeddings: For all images of the batch in order, [N, Q, D].
        counts: Number of images of each row, or None where the rows are never repeated.
        positions: Of the placeholders, row * T + position, [N * Q]; looked for if None, for which a GPU is waited.
        absent: There is no image: the embeddings only keep this process in step with the others.
    """

    token_id: int
    embeddings: Tensor
    counts: Sequence[int] | None = None
    positions: Tensor | None = None
    absent: bool = False


@contextmanager
def placed(network: nn.Module, placements: Sequence[Placement]) -> Iterator[None]:
    """Forward passes of a model in which placeholders have the given embeddings instead of their own.

    The embedding layer itself puts them in, so that it works for sharded models, for adapters on the embeddings, and
    in generation. There, rows may be repeated for beams or several answers; later tokens hold no placeholders.

    Args:
        network: A causal language model, with or without adapters.
        placements: What to put where.
    """

    def put(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for placement in placements:
            output = _put(inputs[0], output, placement)
        return output

    hook = base_model(network).get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def _put(input_ids: Tensor, embedded: Tensor, placement: Placement) -> Tensor:
    embeddings = placement.embeddings.to(embedded.dtype)
    if placement.absent:
        return embedded + 0.0 * embeddings.sum()
    if placement.positions is not None:
        flat = embedded.flatten(0, 1).index_copy(0, placement.positions, embeddings.flatten(0, 1))
        return flat.view_as(embedded)
    where = input_ids == placement.token_id
    counts = placement.counts
    if counts is not None:
        if not bool(where.any()):  # a step of generation after the prompt
            return embedded
        copies = len(input_ids) // len(counts)
        if copies > 1:
            rows = [own for own in torch.split(embeddings, list(counts)) for _ in range(copies)]
            embeddings = torch.cat(rows)
    return embedded.masked_scatter(where[..., None], embeddings)
