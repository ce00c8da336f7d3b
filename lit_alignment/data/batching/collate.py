"""From examples to tensors.

B rows, T tokens, N trained positions
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_alignment.data.encoding.encoder import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX

PAD_MULTIPLE = 8  # lengths that kernels like


@dataclass(kw_only=True)
class Rows:
    """Token ids of a batch, packed or padded.

    Args:
        input_ids: Token ids, [B, T]; packed rows have B = 1.
        position_ids: Positions, which restart at each document, [B, T].
        attention_mask: 1 on tokens, 0 on padding, [B, T]; None in a packed row, which has no padding.
        document_lengths: Lengths of the documents in a packed row, in order; empty in a padded batch.
        document_parents: For each document the one that it goes on from, or -1; empty if there are none.
        window_weight: Trained weight of the whole optimiser step that this batch belongs to.
        ids: Where each example came from.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    document_lengths: list[int] = field(default_factory=list)
    document_parents: list[int] = field(default_factory=list)
    window_weight: float = 0.0
    ids: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    @property
    def num_trained(self) -> int:
        """Places that the loss applies to."""
        raise NotImplementedError


@dataclass(kw_only=True)
class TokenBatch(Rows):
    """A batch of tokens for training on them.

    Args:
        labels: The same ids where the loss applies, else IGNORE_INDEX, [B, T]; aligned with `input_ids`.
        weights: Weight of each label, [B, T].
    """

    labels: Tensor
    weights: Tensor

    @property
    def num_trained(self) -> int:
        """Tokens that the loss applies to."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(kw_only=True)
class ScoreBatch(Rows):
    """A batch of sequences with places at which scores are read.

    Args:
        read_at: Places of the scores, counted through the rows one after the other: row * T + position, [N].
        targets: What the scores should be, or say of each other, [N] or [N, K].
        groups: Number of scores of each record, in order; they sum to N.
        weights: Weight of each record, [R]; 0 for one that only keeps its rank in step.
        margins: How far apart the scores of a pair should be, [R]; only for rewards.
        subsets: The part of a benchmark that each record belongs to; "" if none.
    """

    read_at: Tensor
    targets: Tensor
    groups: list[int]
    weights: Tensor
    margins: Tensor | None = None
    subsets: list[str] = field(default_factory=list)

    @property
    def num_trained(self) -> int:
        """Scores that the loss applies to."""
        return int(self.read_at.numel())


@dataclass
class Sequences:
    """Token ids that may share a beginning, as they go into one batch.

    Args:
        prompt: Ids that all responses follow; may be empty.
        responses: Ids of each response.
    """

    prompt: list[int]
    responses: list[list[int]]

    def num_tokens(self, shared: bool) -> int:
        """Tokens in a packed row, with the prompt once or before each response."""
        times = 1 if shared else len(self.responses)
        return times * len(self.prompt) + sum(map(len, self.responses))


def pack_sequences(items: Sequence[Sequences], share: bool) -> tuple[Rows, list[int]]:
    """One row of all sequences, and the place in it where each response begins.

    Args:
        items: What to put into it.
        share: Let the responses of an item go on from one copy of its prompt. One response never shares.
    """
    ids: list[int] = []
    positions: list[Tensor] = []
    lengths: list[int] = []
    parents: list[int] = []
    begins: list[int] = []
    for item in items:
        start = len(item.prompt)
        shares = share and len(item.responses) > 1 and start > 0
        if shares:
            parent = len(lengths)
            ids += item.prompt
            positions.append(torch.arange(start))
            lengths.append(start)
            parents.append(-1)
        for response in item.responses:
            begins.append(len(ids) + (0 if shares else start))
            document = response if shares else item.prompt + response
            ids += document
            positions.append(torch.arange(len(document)) + (start if shares else 0))
            lengths.append(len(document))
            parents.append(parent if shares else -1)
    rows = Rows(
        input_ids=torch.tensor([ids]),
        position_ids=torch.cat(positions)[None],
        attention_mask=None,
        document_lengths=lengths,
        document_parents=parents if any(parent >= 0 for parent in parents) else [],
    )
    return rows, begins


def pad_sequences(items: Sequence[Sequences], pad_token_id: int) -> tuple[Rows, list[int]]:
    """One row a response, padded on the right, and the place (row * T + position) where each response begins."""
    whole = [item.prompt + response for item in items for response in item.responses]
    prompts = [len(item.prompt) for item in items for _ in item.responses]
    rows = _padded_rows(whole, pad_token_id)
    width = rows.input_ids.shape[1]
    return rows, [row * width + begin for row, begin in enumerate(prompts)]


def _padded_rows(ids: Sequence[Sequence[int]], pad_token_id: int) -> Rows:
    width = -(-max(map(len, ids)) // PAD_MULTIPLE) * PAD_MULTIPLE
    lengths = torch.tensor([len(row) for row in ids])
    return Rows(
        input_ids=_pad(ids, width, pad_token_id, torch.long),
        position_ids=torch.arange(width).expand(len(ids), width).contiguous(),
        attention_mask=(torch.arange(width)[None] < lengths[:, None]).long(),
    )


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
    rows = _padded_rows([example.input_ids for example in examples], pad_token_id)
    width = rows.input_ids.shape[1]
    return TokenBatch(
        **vars(rows) | {"window_weight": window_weight},
        labels=_pad([[IGNORE_INDEX, *e.labels[1:]] for e in examples], width, IGNORE_INDEX, torch.long),
        weights=_pad([e.weights for e in examples], width, 0.0, torch.float32),
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
