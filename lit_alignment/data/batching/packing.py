"""From example lengths to the batches of an epoch, and the trained weight of each accumulation window.

The whole epoch is planned before it starts, as a pure function of lengths, weights, seed, epoch and the shape of a
window, so every rank knows, without communication, what every other rank will train on.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

PACKING_BUFFER = 1024  # examples that are packed against each other; larger packs tighter but mixes less


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch of one rank.

    Args:
        indices: Examples in it.
        window_weight: Trained weight of all micro-batches on all ranks that share its optimizer step.
        window_examples: Number of examples in these micro-batches.
        window_chat_tokens: Weight of the tokens of all chats in them.
        dummy: Whether it only keeps this rank in step with the others; its labels are then ignored.
        share: Its tokens as a share of those of the window.
        window: In a rank's first micro-batch of an optimizer step, those of all ranks in that step, without examples of
            weight 0; in its later ones empty, and None where there are no steps.
        ranks: This rank, and the number of ranks, whose micro-batches alternate in the window.
    """

    indices: list[int]
    window_weight: float
    window_examples: int = 0
    window_chat_tokens: float = 0.0
    dummy: bool = False
    share: float = 0.0
    window: Sequence[list[int]] | None = None
    ranks: tuple[int, int] = (0, 1)

    @property
    def own_window(self) -> list[list[int]]:
        """Of the window the micro-batches of this rank; empty where it has a dummy, so that all ranks have as many."""
        if self.window is None:
            return [[] if self.dummy else self.indices]
        rank, number = self.ranks
        rounds = (self.window[start : start + number] for start in range(0, len(self.window), number))
        return [groups[rank] if rank < len(groups) else [] for groups in rounds]


@dataclass(frozen=True)
class Stretch:
    """The first batches of an epoch, or of what was left of it, as they were planned.

    Args:
        tokens_per_batch: Of the plan.
        batch_size: Of the plan.
        used: How many of its micro-batches were trained, on all ranks together.
    """

    tokens_per_batch: int | None
    batch_size: int
    used: int


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group positions so that the lengths of each group sum to at most `capacity`: best fit, longest first.

    Args:
        lengths: Length of each example, each at most `capacity`.
        capacity: Tokens in a row.

    Returns:
        Groups of positions into `lengths`; every position stands in exactly one.

    Raises:
        ValueError: If an example is longer than a row.

    Source: best-fit decreasing, Johnson 1973; for language models Ding et al. 2024 (arXiv:2404.10830).
    """
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    rows: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        if length > capacity:
            raise ValueError(f"An example has {length} tokens, but a row holds {capacity}; raise tokens_per_batch.")
        slot = bisect_left(rooms, (length, -1))
        if slot == len(rooms):
            rows.append([position])
            room, row = capacity, len(rows) - 1
        else:
            room, row = rooms.pop(slot)
            rows[row].append(position)
        insort(rooms, (room - length, row))
    return rows


@dataclass(frozen=True)
class BatchPlan:
    """What decides the batches of an epoch.

    Args:
        lengths: Tokens of each example.
        weights: Trained weight of each example.
        tokens_per_batch: Tokens in a packed row; None plans `batch_size` examples a batch instead. An example that is
            longer has a row of its own.
        batch_size: Examples in an unpacked batch.
        shuffle: New order each epoch; without it, order is by position.
        seed: Seed of the order.
        repeats: Whether every epoch has the order of the first.
        chat_tokens: Weight of the tokens of each chat that trains beside the other examples; 0 for these, None without
            chats.
    """

    lengths: NDArray[np.int64]
    weights: NDArray[np.float64]
    tokens_per_batch: int | None
    batch_size: int
    shuffle: bool
    seed: int
    repeats: bool = False
    chat_tokens: NDArray[np.float64] | None = None

    @cached_property
    def _rows(self) -> list[list[int]]:
        """The packed rows that every epoch refills; their number must not change between epochs."""
        order = np.arange(len(self.lengths))
        if self.shuffle:
            np.random.default_rng(self.seed).shuffle(order)
        rows: list[list[int]] = []
        for start in range(0, len(order), PACKING_BUFFER):
            part = order[start : start + PACKING_BUFFER]
            capacity = self.tokens_per_batch or 0
            lengths = np.minimum(self.lengths[part], capacity)  # one that is longer fills a row
            rows += [part[row].tolist() for row in pack(lengths.tolist(), capacity)]
        return rows

    def groups(self, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch in order, before they are sharded across ranks.

        Packed rows are shuffled in two ways: examples of equal length change places, and rows change order.
        Both keep the lengths of the rows, so every epoch has the same number of batches and steps.
        """
        generator = np.random.default_rng([self.seed, 0 if self.repeats else epoch])
        if self.tokens_per_batch is None:
            order = np.arange(len(self.lengths))
            if self.shuffle:
                generator.shuffle(order)
            return [order[i : i + self.batch_size].tolist() for i in range(0, len(order), self.batch_size)]
        if not self.shuffle:
            return self._rows
        taker = np.arange(len(self.lengths))
        by_length = np.argsort(self.lengths, kind="stable")
        taker[by_length] = np.lexsort((generator.random(len(self.lengths)), self.lengths))
        return [taker[self._rows[i]].tolist() for i in generator.permutation(len(self._rows))]

    def left(self, epoch: int, stretches: Sequence[Stretch]) -> list[list[int]]:
        """The micro-batches of an epoch that are left when others have been trained, each record once.

        Args:
            epoch: Epoch number.
            stretches: What was trained, in order; their batches may have been of another size.
        """
        records = np.arange(len(self.lengths))
        for number, stretch in enumerate(stretches, 1):
            plan = replace(self, tokens_per_batch=stretch.tokens_per_batch, batch_size=stretch.batch_size)
            groups = plan._groups_of(records, epoch)
            if number == len(stretches) and plan.settings == self.settings:
                return groups[stretch.used :]
            used = [index for group in groups[: stretch.used] for index in group]
            records = np.setdiff1d(records, used)
        return self._groups_of(records, epoch)

    def _groups_of(self, records: NDArray[np.int64], epoch: int) -> list[list[int]]:
        """The micro-batches of some of the examples."""
        if len(records) == len(self.lengths):
            return self.groups(epoch)
        part = replace(self, lengths=self.lengths[records], weights=self.weights[records])
        return [records[group].tolist() for group in part.groups(epoch)]

    @property
    def settings(self) -> tuple[int | None, int]:
        """What decides which examples share a micro-batch."""
        return self.tokens_per_batch, self.batch_size

    @property
    def num_groups(self) -> int:
        """Micro-batches of an epoch on all ranks."""
        if self.tokens_per_batch is None:
            return -(-len(self.lengths) // self.batch_size)
        return len(self._rows)

    def batches(
        self, groups: Sequence[list[int]], rank: int = 0, world_size: int = 1, accumulate: int | None = None
    ) -> list[PlannedBatch]:
        """The micro-batches of one rank.

        Micro-batch k goes to rank k % world_size; `accumulate` x `world_size` neighbours make one optimizer step. Where
        the last round has too few, the ranks without one get a dummy batch of weight 0.

        Args:
            groups: The micro-batches of all ranks.
            rank: This process.
            world_size: Number of processes.
            accumulate: Micro-batches a rank sees in one optimizer step; None where there are no steps.
        """
        window = (accumulate or 1) * world_size
        totals = [self._totals(groups[start : start + window]) for start in range(0, len(groups), window)]
        tokens = [int(self.lengths[group].sum()) for group in groups]
        planned = []
        for first in range(0, len(groups), world_size):
            position = first + rank
            of_window = totals[first // window]
            begin = first // window * window
            if position < len(groups):
                share = tokens[position] / sum(tokens[begin : begin + window])
                batch = PlannedBatch(groups[position], *of_window, share=share)
            else:
                shortest = min(groups[first], key=lambda i: self.lengths[i])
                batch = PlannedBatch([int(shortest)], *of_window, dummy=True)
            if accumulate is not None:
                whole = groups[begin : begin + window] if first == begin else ()
                whole = [[index for index in group if self.weights[index] > 0] for group in whole]
                batch = replace(batch, window=whole, ranks=(rank, world_size))
            planned.append(batch)
        return planned

    def _totals(self, groups: Sequence[list[int]]) -> tuple[float, int, float]:
        """Trained weight, number of examples, and weight of the chats' tokens, of some micro-batches."""
        indices = [index for group in groups for index in group]
        chat_tokens = 0.0 if self.chat_tokens is None else float(self.chat_tokens[indices].sum())
        return float(self.weights[indices].sum()), len(indices), chat_tokens
