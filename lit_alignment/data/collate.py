"""From examples to tensors.

B rows, T tokens, N trained positions
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_alignment.data.encode import Example
from lit_alignment.data.messages import IGNORE_INDEX

PAD_MULTIPLE = 8  # lengths that kernels like


@dataclass
class TokenBatch:
    """A batch of tokens for training, packed or padded.

    Args:
        input_ids: Token ids, [B, T]; packed rows have B = 1.
        labels: The same ids where the loss applies, else IGNORE_INDEX, [B, T]; aligned with `input_ids`.
        weights: Weight of each label, [B, T].
        position_ids: Positions, which restart at each document, [B, T].
        attention_mask: 1 on tokens, 0 on padding, [B, T]; None in a packed row, which has no padding.
        document_lengths: Lengths of the documents in a packed row, in order; empty in a padded batch.
        window_weight: Trained weight of the whole optimiser step that this batch belongs to.
        ids: Where each example came from.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    document_lengths: list[int] = field(default_factory=list)
    window_weight: float = 0.0
    ids: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())


def collate_packed(examples: Sequence[Example], window_weight: float = 0.0) -> TokenBatch:
    """One row that holds the examples one after the other, each a document of its own.

    The first token of each document loses its label: nothing of its own document predicts it.
    """
    lengths = [len(example.input_ids) for example in examples]
    labels = [label for e in examples for label in [IGNORE_INDEX, *e.labels[1:]]]
    return TokenBatch(
        input_ids=torch.tensor([[i for e in examples for i in e.input_ids]]),
        labels=torch.tensor([labels]),
        weights=torch.tensor([[w for e in examples for w in e.weights]], dtype=torch.float32),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        document_lengths=lengths,
        window_weight=window_weight,
    )


def collate_padded(examples: Sequence[Example], pad_token_id: int, window_weight: float = 0.0) -> TokenBatch:
    """One row an example, padded on the right. Padding is told by position, so pad may equal EOS."""
    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    attention_mask = (torch.arange(width)[None] < lengths[:, None]).long()
    return TokenBatch(
        input_ids=_pad([e.input_ids for e in examples], width, pad_token_id, torch.long),
        labels=_pad([[IGNORE_INDEX, *e.labels[1:]] for e in examples], width, IGNORE_INDEX, torch.long),
        weights=_pad([e.weights for e in examples], width, 0.0, torch.float32),
        position_ids=torch.arange(width).expand(len(examples), width).contiguous(),
        attention_mask=attention_mask,
        window_weight=window_weight,
    )


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and their attention mask, both [B, T]."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def _pad(rows: Sequence[Sequence[float]], width: int, value: float, dtype: torch.dtype) -> Tensor:
    out = torch.full((len(rows), width), value, dtype=dtype)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.tensor(row, dtype=dtype)
    return out
