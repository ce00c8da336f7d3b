"""The loader behind every training and validation loop: it follows a plan."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.errors import AlignmentError

Batch = TypeVar("Batch")


class _PlannedDataset(Dataset[Batch | AlignmentError]):
    """Item i is the i-th planned batch, built where it is asked for: in a worker, if there are any."""

    def __init__(self, plan: Sequence[PlannedBatch], build: Callable[[PlannedBatch], Batch]) -> None:
        self.plan, self.build = plan, build

    def __getitem__(self, index: int) -> Batch | AlignmentError:
        try:
            return self.build(self.plan[index])
        except AlignmentError as error:  # raised in a worker it would arrive as a traceback in a text
            return error

    def __len__(self) -> int:
        return len(self.plan)


def handled_signals() -> list[int]:
    """Signals that end a process, and that this one handles; Ctrl-C is always its own."""
    return [
        each
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        if each == signal.SIGINT or callable(signal.getsignal(each))
    ]


def ignore_signals(numbers: Iterable[int], worker: int) -> None:
    """Leave signals to the process that trains, which a terminal and a supervisor send to its workers, too.

    A worker that one ends, ends the training before it is saved; one whose training is gone ends by itself. What that
    process does not handle ends a worker as it does others: its DataLoader could not stop one that hangs.

    Args:
        numbers: Those that the process that trains handles.
        worker: The worker's.
    """
    for each in numbers:
        signal.signal(each, signal.SIG_IGN)


class PlannedLoader(Generic[Batch]):
    """Yields the batches of a plan.

    It is not a DataLoader, so Lightning leaves it alone: no injected sampler, no re-instantiation. Lightning finds
    `set_epoch` through `batch_sampler`.

    Args:
        plan: The batches of an epoch on this rank; asked for when an epoch is iterated.
        build: Turns a planned batch into tensors.
        length: Batches of an epoch on this rank, as Lightning counts them; the plan may stop earlier.
        num_workers: Processes that build batches ahead.
        pin_memory: Build in page-locked memory.
    """

    def __init__(
        self,
        plan: Callable[[int], list[PlannedBatch]],
        build: Callable[[PlannedBatch], Batch],
        length: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Start before the first epoch."""
        self.plan, self.build = plan, build
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.epoch = 0
        self._length = length

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for `set_epoch`; a `sampler` of our own would make it suspect shuffled validation."""
        return SimpleNamespace(sampler=self, batch_size=1)  # DeepSpeed shows its size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module stores the position. Lightning warns of loaders that cannot resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of this epoch, on this rank.

        Raises:
            AlignmentError: As building one does.
        """
        dataset = _PlannedDataset(self.plan(self.epoch), self.build)
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": self.pin_memory}
        batches: Iterable[Batch | AlignmentError] = map(dataset.__getitem__, range(len(dataset)))
        if self.num_workers or self.pin_memory:
            begin = partial(ignore_signals, handled_signals())
            batches = DataLoader(dataset, batch_size=None, worker_init_fn=begin, **options)
        for batch in batches:
            if isinstance(batch, AlignmentError):
                raise batch
            yield batch
