"""The batches of a training, and where in them it stands."""

import math
from abc import abstractmethod
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import Rows, filled
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.batching.position import (
    FROM_WEIGHTS,
    Begun,
    Window,
    epoch_length,
    identity,
    read_position,
    refuse_other_data,
    update_position,
    write_position,
)
from lit_alignment.data.batching.standing import accumulation, standing
from lit_alignment.data.batching.streaming import StreamedLoader
from lit_alignment.data.examples import column
from lit_alignment.data.sources.record_batches import CachedRows, IndexedRows
from lit_alignment.data.sources.report import DataReport, write_reports
from lit_alignment.data.streamed import TrainStream
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.files import conformed


def data_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Whose batches a process trains on, and the number of those who have different ones."""
    given = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if given is None else (given["rank"], given["num_replicas"])


class PlannedDataModule(LightningDataModule):
    """Loaders that follow a plan, and go on in it after a resume.

    Attributes:
        examples: Encoded examples of each split.
        reports: What became of the records of each split.
        num_workers: Processes that build batches ahead.
        seed: Seed of every order.
        tokenizer: The model's.
        tokens_per_batch: Tokens of a packed row.
        fills_rows: Whether packed rows are filled up to that length, as a compiled model asks.
        stream: The training data, where they are read as the training goes.
    """

    examples: dict[str, CachedRows]
    reports: dict[str, DataReport]
    num_workers: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int
    fills_rows = False
    stream: TrainStream | None = None

    def __init__(self) -> None:
        """Nothing has been trained."""
        super().__init__()
        self._train_loader: PlannedLoader[Any] | StreamedLoader[Any] | None = None
        self._train_plan: BatchPlan | None = None
        self.begun = Begun(0)  # the epoch in which a resumed training stands

    def begin(self) -> None:
        """Forget where an earlier run stood, and what its data were."""
        self._train_plan, self.begun, self.stream = None, Begun(0), None
        self.__dict__.pop("_identity", None)

    @abstractmethod
    def plan(self, split: Any) -> BatchPlan:
        """What decides the batches of a split that is loaded."""

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> Any:
        """Tensors of one batch."""

    def train_dataloader(self) -> PlannedLoader[Any] | StreamedLoader[Any]:
        """Shuffled batches that know the trained weight of their optimizer step."""
        self._train_loader = self._loader("train") if self.stream is None else self._streamed_loader(self.stream)
        return self._train_loader

    def _streamed_loader(self, stream: TrainStream) -> StreamedLoader[Any]:
        ranks, accumulate = data_rank(self.trainer), self._window(0).accumulate
        return StreamedLoader(partial(stream.batches, accumulate, ranks, self.num_workers, self._batch))

    def teardown(self, stage: str) -> None:
        """Say what became of the records that were streamed."""
        if stage == "fit" and self.stream is not None and self.trainer is not None:
            ranks = data_rank(self.trainer)[1]
            rank_zero_info(self.stream.report.line() + (f"\n  note: of 1 rank of {ranks}" if ranks > 1 else ""))
            directory = self.trainer.log_dir  # every rank must ask for it, and as often
            if directory and self.trainer.is_global_zero:
                write_reports(self.reports, Path(directory))

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, for a checkpoint: what stands behind the last optimizer step."""
        if self._train_loader is None or self.trainer is None:
            return {}
        at = standing(self.trainer)
        if self.stream is not None:
            counts = {"batches": at.batches, "global_step": self.trainer.global_step}
            positions = self.stream.state_dict(at.batches, data_rank(self.trainer)[0])
            train = {"epoch": 0, **counts, "accumulate": self._window(0).accumulate, "streams": positions}
            return {"train": train, "data": self._identity}
        position = write_position(
            self._training_plan(), at, self._begun(at.epoch), self._window(at.epoch), self.trainer.global_step
        )
        return {"train": position, "data": self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at a checkpoint's position; sharded strategies restore when the loader is there already.

        Raises:
            CheckpointError: If it was trained on other data, or in another order.
        """
        if self.trainer is None or self.trainer.state.fn != "fit" or "train" not in state_dict:
            return
        if "data" in state_dict:  # earlier versions did not write it
            refuse_other_data(state_dict["data"], self._identity)
        if self.stream is not None:
            self._resume_stream(self.stream, state_dict["train"])
            return
        self.begun = read_position(
            self._training_plan(), state_dict["train"], self._window(state_dict["train"]["epoch"])
        )
        limit = self.trainer.limit_train_batches
        if self.begun.changed and limit != 1.0:
            raise ConfigError(
                f"trainer.limit_train_batches is {limit}, and the checkpoint's epoch was begun with other batches "
                f"({', '.join(self.begun.changed)}). Resume with the same batches until the epoch ends, or without the "
                "limit."
            )

    def update_checkpoint(self, checkpoint: dict[str, Any], stored: dict[str, Any]) -> None:
        """Bring a checkpoint of an earlier version into today's form; `stored` is the data module's part of it."""
        was_streamed = "streams" in stored["train"]
        if was_streamed != (self.stream is not None):
            wanted = str(was_streamed).lower()
            raise CheckpointError(
                f"the checkpoint was trained with data.streaming: {wanted}. Resume with that; or {FROM_WEIGHTS}."
            )
        if was_streamed:
            form = {"epoch": 0, "batches": 0, "global_step": 0, "accumulate": 0, "streams": []}
            stored["train"] = conformed(stored["train"], form, "train", counts=True)
            return
        epoch = stored["train"]["epoch"]
        update_position(checkpoint, stored, self._training_plan(), self._window(epoch))

    def _resume_stream(self, stream: TrainStream, train: dict[str, Any]) -> None:
        """Go on behind a checkpoint's last optimizer step; another accumulation takes as many records from there on."""
        batches, then, now = train["batches"], train["accumulate"], self._window(0).accumulate
        changed = [] if then == now else [f"accumulate_grad_batches {then} -> {now}"]
        if changed:  # Lightning steps where its count is a multiple of the window's length
            batches = -(-batches // now) * now
        stream.load_state_dict(batches, train["streams"], data_rank(self.trainer)[0])
        self.begun = Begun(0, train["global_step"], batches, changed=changed)

    def epoch_length(self, epoch: int) -> float:
        """Micro-batches of each rank in an epoch, within `limit_train_batches`; infinite where they are streamed."""
        if self.stream is not None:
            return math.inf
        length = epoch_length(self._training_plan(), self._begun(epoch), data_rank(self.trainer)[1])
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(length, limit) if isinstance(limit, int) else int(length * limit)

    def _training_plan(self) -> BatchPlan:
        if self._train_plan is None:
            self._train_plan = self.plan("train")
        return self._train_plan

    def _begun(self, epoch: int) -> Begun:
        return self.begun if self.begun.epoch == epoch else Begun(epoch)

    def _window(self, epoch: int) -> Window:
        accumulate = 1 if self.trainer is None else accumulation(self.trainer, epoch)
        return Window(data_rank(self.trainer)[1], accumulate)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        if self.stream is not None:
            return self.stream.identity(data_rank(self.trainer)[1])
        dataset = self.examples["train"]
        ids = dataset.column("id")
        return identity(column(dataset, "length"), column(dataset, "weight"), ids, self.seed)

    def _loader(self, split: str) -> PlannedLoader[Any]:
        dataset, plan = self.examples[split], self._training_plan() if split == "train" else self.plan(split)
        rank, ranks = data_rank(self.trainer)

        def batches(epoch: int) -> list[PlannedBatch]:
            if split != "train":
                return plan.batches(plan.groups(0), rank, ranks)
            begun = self._begun(epoch)
            # A limit cuts the last window short, so the plan has to know it.
            groups = plan.left(epoch, begun.stretches)[: (int(self.epoch_length(epoch)) - begun.batches) * ranks]
            return plan.batches(groups, rank, ranks, self._window(epoch).accumulate)

        build = partial(self._batch, dataset)
        pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        begun = Begun(0)
        if split == "train" and self.trainer is not None:
            begun = self._begun(max(self.begun.epoch, self.trainer.current_epoch))
        return PlannedLoader(batches, build, epoch_length(plan, begun, ranks), self.num_workers, pin_memory)

    def _batch(self, rows: IndexedRows, planned: PlannedBatch) -> Any:
        batch = self.collate(rows.rows(planned.indices), planned)
        if not isinstance(batch, Rows):
            return batch
        batch = replace(batch, window_share=planned.share)
        return filled(batch, self.tokens_per_batch, int(self.tokenizer.pad_token_id or 0)) if self.fills_rows else batch

    def __getstate__(self) -> dict[str, Any]:
        """What workers need that are not forked: all but the Trainer and what belongs to it."""
        left_out = ("_train_loader", "answered", "stream")
        kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return kept | {"trainer": None, "_train_loader": None, "answered": set}
