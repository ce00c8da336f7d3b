"""From examples to tensors.

B rows, T tokens, N positions that are read
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_alignment.data.encoding.example import Example
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
        document_parents: For each document the one that it continues, or -1; empty if there are none.
        window_weight: Trained weight of the whole optimizer step that this batch belongs to.
        window_share: The tokens of its examples as a share of those of the optimizer step.
        ids: Where each example came from.
        num_padding: Tokens at the end of a packed row that only fill it up, as a last document of their own.
        local: Indices into the positions that are read, of those in this rank's slice of a row that ranks share; None
            where no rank shares it.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    document_lengths: list[int] = field(default_factory=list)
    document_parents: list[int] = field(default_factory=list)
    window_weight: float = 0.0
    window_share: float = 0.0
    ids: list[str] = field(default_factory=list)
    num_padding: int = 0
    local: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        whole = self.input_ids.numel() - self.num_padding
        return int(whole if self.attention_mask is None else self.attention_mask.sum())

    @property
    def num_trained(self) -> int:
        """Positions that the loss applies to."""
        raise NotImplementedError


AnyRows = TypeVar("AnyRows", bound=Rows)


@dataclass(kw_only=True)
class TargetBatch(Rows):
    """Rows with the tokens in them that are to be predicted, in the order of records, responses and tokens.

    The positions are indices made with the batch: to look for labels in a tensor on a GPU, the CPU would wait for it.

    Args:
        read_at: Positions whose hidden states predict the targets, row * T + position, [N].
        targets: Token ids that follow there, [N].
        weights: Weight of each target, [N].
        lengths: Number of targets of each response; they sum to N.
        groups: Number of responses of each record; they sum to the number of lengths.
    """

    read_at: Tensor
    targets: Tensor
    weights: Tensor
    lengths: list[int]
    groups: list[int]

    @property
    def num_trained(self) -> int:
        """Tokens that the loss applies to."""
        return self.read_at.numel()


@dataclass(kw_only=True)
class ScoreBatch(Rows):
    """A batch of sequences with positions at which scores are read.

    Args:
        read_at: Positions of the scores, counted through the rows one after the other: row * T + position, [N].
        targets: What the scores should be, or say of each other, [N] or [N, K].
        groups: Number of scores of each record, in order; they sum to N.
        weights: Weight of each record, [R]; 0 for one that only keeps its rank in step.
        pairs: Of each record with two scores that are compared the position of the better one, that of the other, and
            the record, [3, P]; only for rewards.
        margins: How far apart the scores of a pair should be, [R]; only for rewards.
        subsets: The part of a benchmark that each record belongs to; "" if none.
    """

    read_at: Tensor
    targets: Tensor
    groups: list[int]
    weights: Tensor
    pairs: Tensor | None = None
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
    """One row of all sequences, and the position in it where each response begins.

    Args:
        items: What to put into it.
        share: Let the responses of an item continue from one copy of its prompt. One response never shares.
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
    """One row a response, padded on the right, and the position (row * T + t) where each response begins."""
    whole = [item.prompt + response for item in items for response in item.responses]
    prompts = [len(item.prompt) for item in items for _ in item.responses]
    rows = _padded_rows(whole, pad_token_id)
    width = rows.input_ids.shape[1]
    return rows, [row * width + begin for row, begin in enumerate(prompts)]


def filled(rows: AnyRows, length: int, pad_token_id: int) -> AnyRows:
    """A packed row with a last document of padding, which nothing reads, so that all rows have one shape.

    Args:
        rows: A packed row; padded rows come back as they are.
        length: Tokens of a row. It is rounded up, and a longer row becomes a multiple of it.
        pad_token_id: What it is filled up with.
    """
    length = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    missing = -rows.input_ids.shape[1] % length
    if not rows.document_lengths or missing == 0:
        return rows
    return replace(
        rows,
        input_ids=pad(rows.input_ids, (0, missing), value=pad_token_id),
        position_ids=torch.cat([rows.position_ids, torch.arange(missing)[None]], dim=1),
        document_lengths=[*rows.document_lengths, missing],
        document_parents=[*rows.document_parents, -1] if rows.document_parents else [],
        num_padding=missing,
    )


def _padded_rows(ids: Sequence[Sequence[int]], pad_token_id: int) -> Rows:
    width = -(-max(map(len, ids)) // PAD_MULTIPLE) * PAD_MULTIPLE
    lengths = torch.tensor([len(row) for row in ids])
    return Rows(
        input_ids=_pad(ids, width, pad_token_id, torch.long),
        position_ids=torch.arange(width).expand(len(ids), width).contiguous(),
        attention_mask=(torch.arange(width)[None] < lengths[:, None]).long(),
    )


def collate_responses(
    records: Sequence[Sequence[Example]],
    pad_token_id: int | None = None,
    share: bool = False,
    window_weight: float = 0.0,
) -> TargetBatch:
    """The responses of records, each with what stands before it, and the tokens in them that are trained.

    The first token of a sequence is no target: nothing of its own document predicts it. Padding is told by position,
    so pad may equal EOS.

    Args:
        records: Responses of each record.
        pad_token_id: Makes one row of each response, padded on the right with it; None packs all into one row, each a
            document of its own.
        share: In a packed row, let the responses of a record continue from one copy of what all of them begin with.
        window_weight: Trained weight of the whole optimizer step.
    """
    items = [common_start(own) if share else Sequences([], [e.input_ids for e in own]) for own in records]
    rows, begins = pack_sequences(items, share) if pad_token_id is None else pad_sequences(items, pad_token_id)
    read_at: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    lengths = []
    starts = iter(begins)
    for own, item in zip(records, items, strict=True):
        for example in own:
            before = next(starts) - len(item.prompt) - 1  # position t is predicted from t - 1
            trained = trained_positions(example)
            read_at += [before + t for t in trained]
            targets += [example.labels[t] for t in trained]
            weights += [example.weights[t] for t in trained]
            lengths.append(len(trained))
    return TargetBatch(
        **vars(rows) | {"window_weight": window_weight},
        read_at=torch.tensor(read_at, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        lengths=lengths,
        groups=[len(own) for own in records],
    )


def trained_positions(example: Example) -> list[int]:
    """Positions of the labels that count."""
    return [t for t, label in enumerate(example.labels) if label != IGNORE_INDEX and t > 0]


def common_start(examples: Sequence[Example]) -> Sequences:
    """The ids of a record's sequences, with what all begin with apart, so that it is computed once.

    The hidden state before the first target is each sequence's own.
    """
    ids = [example.input_ids for example in examples]
    limit = min((trained_positions(example) or [len(example.input_ids)])[0] for example in examples) - 1
    shared = 0
    if len(ids) > 1:
        while shared < limit and len({own[shared] for own in ids}) == 1:
            shared += 1
    return Sequences(ids[0][:shared], [own[shared:] for own in ids])


def local_positions(read_at: Tensor, tokens: slice) -> Tensor:
    """Indices of the positions that lie in a slice of a packed row, [n]; asked on the host, before a device has them.

    Args:
        read_at: Positions, [N].
        tokens: The slice.
    """
    return torch.nonzero((read_at >= tokens.start) & (read_at < tokens.stop)).squeeze(1)


def collate_packed(examples: Sequence[Example], window_weight: float = 0.0) -> TargetBatch:
    """One row that holds the examples one after the other, each a document of its own."""
    return collate_responses([[example] for example in examples], window_weight=window_weight)


def collate_padded(examples: Sequence[Example], pad_token_id: int, window_weight: float = 0.0) -> TargetBatch:
    """One row an example, padded on the right."""
    return collate_responses([[example] for example in examples], pad_token_id, window_weight=window_weight)


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
