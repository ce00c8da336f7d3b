"""Ulysses: ranks share a packed row, each with a slice of its tokens, and exchange them for heads in attention.

H query heads, T tokens of the row, t of a rank's slice, S ranks that share it, C head width
"""

from dataclasses import dataclass
from math import lcm

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce, all_to_all_single


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each packed row.

    Args:
        group: Their process group.
        rank: This one's position among them.
        size: Their number.

    Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv:2309.14509).
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def lengths(self, total: int) -> list[int]:
        """Tokens of each rank's slice of a row; they differ by one at most."""
        short, longer = divmod(total, self.size)
        return [short + (rank < longer) for rank in range(self.size)]

    def own(self, total: int) -> slice:
        """This rank's slice of a row."""
        lengths = self.lengths(total)
        start = sum(lengths[: self.rank])
        return slice(start, start + lengths[self.rank])

    def to_heads(self, tensor: Tensor, total: int) -> Tensor:
        """A slice of the tokens with all heads, [1, H, t, C], for all tokens with a share of them, [1, H/S, T, C]."""
        _, heads, length, width = tensor.shape
        share, lengths = heads // self.size, self.lengths(total)
        sent = tensor.reshape(self.size, share, length, width).transpose(1, 2)  # by receiving rank, then by token
        received = sent.new_empty(total, share, width)
        found = self._exchange(received, sent.reshape(self.size * length, share, width), lengths, [length] * self.size)
        return found.transpose(0, 1)[None]

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """The way back: [1, T, H/S, C] to [1, t, H, C]."""
        _, total, share, width = tensor.shape
        lengths = self.lengths(total)
        length = lengths[self.rank]
        received = tensor.new_empty(self.size * length, share, width)
        found = self._exchange(received, tensor[0].contiguous(), [length] * self.size, lengths)
        return found.view(self.size, length, share, width).transpose(0, 1).reshape(1, length, self.size * share, width)

    def _exchange(self, received: Tensor, sent: Tensor, sizes: list[int], sent_sizes: list[int]) -> Tensor:
        found: Tensor = all_to_all_single(received, sent, sizes, sent_sizes, self.group)  # type: ignore[no-untyped-call]
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors; so are the gradients that come back."""
        total: Tensor = all_reduce(tensor, group=self.group)  # type: ignore[no-untyped-call]
        return total


def spread(key: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads, [1, K, t, C], as often as it takes to give each rank the same number of them."""
    times = lcm(key.shape[1], size) // key.shape[1]
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
