"""The loader behind every training and validation loop: follows a plan, and resumes inside an epoch."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from lit_alignment.data.batching.packing import PlannedBatch

Batch = TypeVar("Batch")


class _PlannedDataset(Dataset[Batch]):
    """Item i is the i-th planned batch, built where it is asked for: in a worker, if there are any."""

    def __init__(self, plan: Sequence[PlannedBatch], build: Callable[[PlannedBatch], Batch]) -> None:
        self.plan, self.build = plan, build

    def __getitem__(self, index: int) -> Batch:
        return self.build(self.plan[index])

    def __len__(self) -> int:
        return len(self.plan)


class PlannedLoader(Generic[Batch]):
    """Yields the batches of a plan and remembers how many of them were used.

    It is not a DataLoader, so Lightning leaves it alone: no injected sampler, no re-instantiation. Lightning finds
    `set_epoch` through `batch_sampler`. The data module stores the position: Lightning's own way, a loader with a
    `state_dict`, is skipped on resuming when a schedule has asked for the number of steps.

    Args:
        plan: The batches of an epoch on this rank.
        build: Turns a planned batch into tensors.
        length: Batches of a full epoch on this rank; the plan may stop earlier.
        world_size: Number of ranks; positions are stored in batches of all ranks together.
        num_workers: Processes that build batches ahead.
        pin_memory: Build in page-locked memory.
    """

    def __init__(
        self,
        plan: Callable[[int], list[PlannedBatch]],
        build: Callable[[PlannedBatch], Batch],
        length: int,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Start before the first epoch."""
        self.plan, self.build = plan, build
        self.world_size, self.num_workers, self.pin_memory = world_size, num_workers, pin_memory
        self.epoch = 0
        self._used = 0
        self._resume: tuple[int, int] | None = None  # (epoch, batches of all ranks)
        self._length = length

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for `set_epoch`; a `sampler` of our own would make it suspect shuffled validation."""
        return SimpleNamespace(sampler=self, batch_size=1)  # DeepSpeed shows its size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches on this rank, the same in every epoch."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of this epoch, on this rank."""
        planned = self.plan(self.epoch)
        self._used = 0
        if self._resume is not None:
            epoch, position = self._resume
            self._resume = None
            if epoch == self.epoch:
                self._used = position // self.world_size
        dataset = _PlannedDataset(planned[self._used :], self.build)
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=None, num_workers=self.num_workers, pin_memory=self.pin_memory
        )
        for batch in loader:
            self._used += 1
            yield batch

    def position(self) -> dict[str, int]:
        """Epoch and number of used batches of all ranks together."""
        return {"epoch": self.epoch, "used": self._used * self.world_size}

    def resume(self, position: dict[str, int]) -> None:
        """Continue at a stored position when its epoch is iterated."""
        self._resume = (position["epoch"], position["used"])
