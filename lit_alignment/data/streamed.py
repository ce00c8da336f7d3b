"""Training data that are read and encoded as the training goes, and never as a whole."""

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_alignment.data.batching.loader import handled_signals, ignore_signals
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.batching.position import FROM_WEIGHTS
from lit_alignment.data.batching.streaming import StreamedRows, StreamPlan, StreamPosition
from lit_alignment.data.encoding.rows import RowEncoder
from lit_alignment.data.sources.cache import fingerprint
from lit_alignment.data.sources.report import DataReport
from lit_alignment.data.sources.stream import RecordStream, StreamMark
from lit_alignment.errors import AlignmentError, CheckpointError, ConfigError, TrainingError
from lit_alignment.files import conformed

CHUNK = 16  # records that travel from a worker together
AHEAD = 32  # chunks that each worker has ready: while a block is trained, the next one is encoded
KEPT = 8  # optimizer steps of which positions are known: the loader is ahead of the last one

Encoded = tuple[StreamMark, str, list[dict[str, Any]]]  # the mark behind a record, its source, and its rows
Build = Callable[[StreamedRows, PlannedBatch], Any]


class EncodedStream(IterableDataset[list[Encoded] | AlignmentError]):
    """The rows of one rank's records in order, in chunks; several workers give the chunks in turn.

    Args:
        stream: The records of all ranks.
        rows: How they become rows.
        mark: Where to begin.
        rank: Whose records.
        ranks: Number of ranks, which get the records in turn.
    """

    def __init__(self, stream: RecordStream, rows: RowEncoder, mark: StreamMark, rank: int, ranks: int) -> None:
        """Nothing is read yet."""
        self.stream, self.rows, self.mark = stream, rows, mark
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[Encoded] | AlignmentError]:
        """The chunks of this worker; an error comes as the last one."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own = (record for record in self.stream.records(self.mark) if record.number % self.ranks == self.rank)
        number = 0
        try:
            while chunk := list(islice(own, CHUNK)):
                if number % workers == worker:
                    yield [self._encoded(record) for record in chunk]
                number += 1
        except AlignmentError as error:  # raised in a worker it would arrive as a traceback in a text
            yield error

    def _encoded(self, record: Any) -> Encoded:
        source = self.stream.sources[record.source]
        validated = self.rows.read(record.raw, record.where, record.position, source)
        return record.behind, source.title, self.rows.rows(validated, source)


def _begin_worker(signals: list[int], number: int) -> None:
    """Leave signals to the process that trains, and end with it: rows that nobody takes would hold a worker back."""
    ignore_signals(signals, number)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class TrainStream:
    """The training data of one rank, and where in them the training stands.

    Args:
        stream: The records of all ranks.
        rows: How they become rows.
        plan: How rows become micro-batches.
        stops_at_drop: Whether a record that does not become an example is an error.
        report: What became of the records of this rank so far.
        begun: Where this run begins, and behind how many micro-batches.
    """

    stream: RecordStream
    rows: RowEncoder
    plan: StreamPlan
    stops_at_drop: bool = False
    report: DataReport = field(default_factory=lambda: DataReport("train"))
    begun: tuple[int, StreamPosition] | None = None

    def __post_init__(self) -> None:
        """Nothing has been trained."""
        self._positions: dict[int, StreamPosition] = {}  # by the number of micro-batches before it
        self._group: Any = None

    def batches(self, accumulate: int, ranks: tuple[int, int], num_workers: int, build: Build) -> Iterator[Any]:
        """This rank's micro-batches from where the run begins; each knows the counts of its whole optimizer step.

        The rows of a step are there before its first micro-batch, so that its counts are summed over the ranks once,
        and the loss is divided by them as ever. All ranks have as many micro-batches: the records have no end.

        Args:
            accumulate: Micro-batches of a step.
            ranks: This rank, and the number of ranks with records of their own.
            num_workers: Processes that read and encode; 0 does it here.
            build: Makes tensors of a micro-batch.

        Raises:
            AlignmentError: If a record cannot be read; on all ranks, so that none waits for another.
        """
        number, position = self.begun or (0, StreamPosition(self.stream.begin))
        self._positions = {number: position}
        examples = self._examples(position.mark, ranks, num_workers)
        windows = self.plan.windows(examples, position, accumulate)
        while True:
            try:
                window = next(windows)
            except AlignmentError:  # the others wait for this rank's counts
                self._over_ranks((0.0, 0, 0, 1), ranks[1])
                raise
            *totals, failed = self._over_ranks((*window.counts, 0), ranks[1])
            if failed:
                raise TrainingError("another rank cannot go on with its records; its own message says why.")
            rows, planned = window.planned(totals)
            number += accumulate
            self._positions[number] = window.behind
            self._positions = dict(list(self._positions.items())[-KEPT:])
            yield from (build(rows, each) for each in planned)

    def _examples(
        self, mark: StreamMark, ranks: tuple[int, int], num_workers: int
    ) -> Iterator[tuple[StreamMark, list[dict[str, Any]]]]:
        """The rows of each record that become examples, with the mark behind it."""
        dataset = EncodedStream(self.stream, self.rows, mark, *ranks)
        chunks: Any = dataset
        if num_workers:
            workers: dict[str, Any] = {"num_workers": num_workers, "prefetch_factor": AHEAD}
            begin = partial(_begin_worker, handled_signals())
            chunks = DataLoader(dataset, batch_size=None, worker_init_fn=begin, **workers)
        last_kept = mark.passes
        for chunk in chunks:
            if isinstance(chunk, AlignmentError):
                raise chunk
            for behind, title, rows in chunk:
                kept = self._counted(title, rows)
                last_kept = behind.passes if kept else last_kept
                if behind.passes > last_kept + ranks[1]:
                    raise ConfigError(
                        f"data.train: no example is left, so there is nothing to train on. {self.report.line()}\n"
                        "Change the records, or what drops them."
                    )
                yield behind, kept

    def _counted(self, title: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that are examples; all are counted."""
        kept = [row for row in rows if not row["dropped"]]
        report = self.report
        report.sources[title] = report.sources.get(title, 0) + 1
        report.examples += len(kept)
        report.tokens += sum(row["length"] for row in kept)
        report.trained_tokens += sum(row.get("num_trained", 0) for row in kept)
        report.longest = max(report.longest, *(row["length"] for row in rows))
        for row in rows:
            report.notes.update(row["notes"])
            if row["dropped"]:
                report.dropped[row["dropped"]] += 1
                if row["detail"]:
                    report.details.setdefault(row["dropped"], row["detail"])
        if self.stops_at_drop and report.dropped:
            raise ConfigError(f"data.on_drop is 'error' and a record was dropped. {report.line()}")
        return kept

    def _over_ranks(self, counts: tuple[float, ...], ranks: int) -> tuple[float, ...]:
        """Counts summed over all ranks with records of their own; on the CPU, so that no device is waited for."""
        if not (dist.is_available() and dist.is_initialized()):
            return counts
        if self._group is None:
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        total = torch.tensor(counts, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return tuple((total * ranks / dist.get_world_size()).tolist())  # ranks that share a batch have counted it all

    # What a checkpoint holds.

    def identity(self, ranks: int) -> dict[str, Any]:
        """What must be the same when a training is resumed.

        Args:
            ranks: Processes with records of their own.
        """
        files = [[(str(f), f.stat().st_size) for f in source.files()] for source in self.stream.sources]
        sources = fingerprint([asdict(source) for source in self.stream.sources], files)
        plan = {"tokens_per_batch": self.plan.tokens_per_batch or 0, "batch_size": self.plan.batch_size}
        order = {"seed": self.stream.seed, "shuffle_buffer": self.stream.buffer, "ranks": ranks}
        return {**order, **plan, "fingerprint": sources}

    def state_dict(self, batches: int, rank: int) -> list[dict[str, Any]]:
        """Positions of all ranks with records of their own.

        Args:
            batches: Micro-batches behind which the training stands.
            rank: Whose records this process has.
        """
        _, begin = self.begun or (0, StreamPosition(self.stream.begin))
        own = asdict(self._positions[batches] if self._positions else begin)  # it may stop before its first batch
        found: list[Any] = [(rank, own)]
        if dist.is_available() and dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, (rank, own))
        of_ranks = dict(found)
        return [of_ranks[each] for each in sorted(of_ranks)]

    def load_state_dict(self, batches: int, positions: list[Any], rank: int) -> None:
        """Begin at a checkpoint's position.

        Args:
            batches: Micro-batches that each rank has trained.
            positions: Of each rank.
            rank: Whose records this process has.

        Raises:
            CheckpointError: If it is none.
        """
        mark = self.stream.begin
        form = asdict(StreamPosition(StreamMark(0, 0, tuple((0, -1) for _ in mark.taken))))
        if not rank < len(positions):
            raise CheckpointError(f"the checkpoint has no position of rank {rank}. It is damaged; {FROM_WEIGHTS}.")
        stored = conformed(positions[rank], form, "train.streams", counts=True)
        taken = tuple((passed, used) for passed, used in stored["mark"]["taken"])
        mark = StreamMark(stored["mark"]["records"], stored["mark"]["draws"], taken)
        self.begun = batches, StreamPosition(mark, stored["block"], stored["used"])
