"""What every data module does: load the examples of each split, plan their batches, resume inside an epoch."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import Rows
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.batching.position import (
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
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.rows import RowEncoder
from lit_alignment.data.encoding.tokenizer import tokenizer_fingerprint
from lit_alignment.data.examples import ExampleMaker, code_fingerprint, column
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.sources.report import DataReport, write_reports
from lit_alignment.errors import ConfigError
from lit_alignment.paths import cache_dir as default_cache_dir

Split = Literal["train", "val", "test", "predict"]
SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class AlignmentDataModule(LightningDataModule):
    """Sources, examples and loaders; a method adds how a record becomes an example and a batch.

    Args:
        tokenizer: The model's tokenizer.
        train: Sources of the training split.
        val: Sources of the validation split.
        test: Sources of the test split.
        predict: Sources of what predict is asked: prompts, conversations to classify, responses to score.
        encoding: How conversations become examples; `max_length` is of a prompt with one response.
        packing: Train and validate on rows that hold several examples, each attending to itself only.
        tokens_per_batch: Tokens in a packed row; by default `encoding.max_length`, or twice that where a record holds
            several responses. A record that is longer has a row of its own.
        batch_size: Examples in an unpacked batch, and in a predict batch.
        num_workers: Processes that build batches ahead; building is cheap, so 0 is usually best.
        num_proc: Processes that read and encode; None for as many as there are cores, where a source is large.
        seed: Seed of every choice and order.
        on_drop: What to do when a record does not become an example.
        cache_dir: Where encoded data are kept; a folder in the user's cache by default.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: list[SourceConfig] | None = None,
        val: list[SourceConfig] | None = None,
        test: list[SourceConfig] | None = None,
        predict: list[SourceConfig] | None = None,
        encoding: EncodingConfig = EncodingConfig(),  # noqa: B008 - frozen
        packing: bool = True,
        tokens_per_batch: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        on_drop: Literal["warn", "error"] = "warn",
        cache_dir: str | None = None,
    ) -> None:
        """Check the settings; files are read in `prepare_data`."""
        super().__init__()
        self.tokenizer = tokenizer
        self.sources: dict[Split, list[SourceConfig]] = {
            "train": train or [],
            "val": val or [],
            "test": test or [],
            "predict": predict or [],
        }
        self.encoding, self.packing = encoding, packing
        self.tokens_per_batch = tokens_per_batch or self.lengths_in_row * encoding.max_length
        self.batch_size, self.num_workers, self.num_proc = batch_size, num_workers, num_proc
        self.seed, self.on_drop = seed, on_drop
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir() / "data"
        self.examples: dict[str, datasets.Dataset] = {}
        self.reports: dict[str, DataReport] = {}
        self._train_loader: PlannedLoader[Any] | None = None
        self._train_plan: BatchPlan | None = None
        self.begun = Begun(0)  # the epoch in which a resumed training stands
        # Gives (dataset, id) of prompts that need no answer any more; asked when the loader is made.
        self.answered: Callable[[], set[tuple[str, str]]] = set
        self.check_settings()

    # What a method adds. Records are whatever `read` gives, with an `id` and a `where`.

    lengths_in_row = 1  # a packed row is so many times as long as `encoding.max_length` by default
    marked = "trained"  # what the labels of `views` say of a token
    share_prompts = False  # whether responses in a packed row continue one copy of their prompt

    def check_settings(self) -> None:
        """Refuse settings that do not go together, before anything is read.

        Raises:
            ConfigError: Naming them.
        """
        if self.packing and self.tokens_per_batch < self.encoding.max_length:
            raise ConfigError(
                f"data.tokens_per_batch is {self.tokens_per_batch}, less than encoding.max_length "
                f"{self.encoding.max_length}: a single example might not fit. Raise the one or lower the other."
            )
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size is {self.batch_size}; use 1 or more.")

    @abstractmethod
    def read(self, raw: object, where: str, position: int) -> Any:
        """One raw record, validated.

        Args:
            raw: The parsed JSON value.
            where: File and line.
            position: Index in the source, the id of a record that has none.

        Raises:
            RecordError: Naming the field and the fix.
        """

    @property
    @abstractmethod
    def features(self) -> datasets.Features:
        """Columns of an encoded example: ROW_FEATURES, `weight`, and the method's own."""

    @abstractmethod
    def encode_record(self, record: Any, source: SourceConfig) -> dict[str, Any]:
        """Columns of one example, without ROW_FEATURES' own except `length`.

        Raises:
            Dropped: If the record does not become an example.
        """

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> Any:
        """Tensors of one batch."""

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of what is asked in predict: ROW_FEATURES and the method's own."""
        raise ConfigError(f"{type(self).__name__} has nothing to predict.")

    @abstractmethod
    def predict_row(self, record: Any, source: SourceConfig) -> dict[str, Any]:
        """Columns of what a record asks in predict, without ROW_FEATURES' own except `length`.

        Raises:
            Dropped: If there is nothing to ask.
        """

    @abstractmethod
    def predict_item(self, row: dict[str, Any], index: int) -> Any:
        """One row of `predict_features`; `index` is its position among all."""

    @abstractmethod
    def predict_collate(self, items: list[Any]) -> Any:
        """What `predict_step` gets."""

    def decides_encoding(self) -> list[Any]:
        """What decides the columns of an example, for the cache's names; a method adds its own to these."""
        return [type(self).__name__, tokenizer_fingerprint(self.tokenizer)]

    def split_record(self, record: Any) -> list[Any]:
        """The parts of a record whose responses do not fit into one example, as they see other histories."""
        return []

    def remarks(self) -> list[str]:
        """What somebody should know about the way of encoding, before training."""
        return []

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """The token sequences of one encoded row, each with its name, for people to look at."""
        return []

    def chat_template(self) -> str | dict[str, str] | None:
        """What conversations are rendered with, as a Jinja template to be saved with the model."""
        return None

    # Examples.

    def prepare_data(self) -> None:
        """Encode into the cache on one process, so that the others only map the files."""
        running = None if self.trainer is None else self.trainer.state.fn
        for split in self._needed("fit" if running is None else str(running.value)):
            for source in self.sources[split]:
                self._maker(split == "predict").encoded(source)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage and report what became of their records."""
        for split in self._needed(stage):
            dataset, report = self._maker(split == "predict").load(self.sources[split], split)
            report.remarks = report.remarks if self.reports else self.remarks()  # said once
            self.examples[split], self.reports[split] = dataset, report
            self._train_plan = None
            rank_zero_info(report.line())
            if self.on_drop == "error" and report.dropped:
                raise ConfigError(f"data.on_drop is 'error' and records were dropped. {report.line()}")
            if len(dataset) == 0:
                raise ConfigError(f"nothing to {stage} on. {report.line()}")
        # Every rank must ask for it: ranks agree on log_dir.
        directory = self.trainer.log_dir if self.trainer is not None else None
        if directory and self.trainer is not None and self.trainer.is_global_zero:
            write_reports(self.reports, Path(directory))

    def _needed(self, stage: str) -> list[Split]:
        splits = SPLITS[stage]
        if not self.sources[splits[0]]:
            raise ConfigError(f"data.{splits[0]} is empty: give at least one source to {stage} on.")
        return [split for split in splits if self.sources[split]]

    def _maker(self, prompts: bool) -> ExampleMaker:
        """What makes the examples, or the prompts of predict."""
        if prompts:
            rows = RowEncoder(self.read, self.predict_row, self.predict_features)
        else:
            rows = RowEncoder(self.read, self.encode_record, self.features, self.split_record)
        written_in = tuple(kind.__module__ for kind in type(self).__mro__ if issubclass(kind, AlignmentDataModule))
        decides = ["predict" if prompts else "train", code_fingerprint(written_in), *self.decides_encoding()]
        return ExampleMaker(rows, decides, self.cache_dir, self.seed, self.num_proc)

    def predict_items(self, sources: Sequence[SourceConfig]) -> list[Any]:
        """What any sources ask in predict, in order, without a cache: for cherry picks."""
        maker = self._maker(True)
        rows = (row for source in sources for row in maker.fresh_rows(source) if not row["dropped"])
        return [self.predict_item(row, index) for index, row in enumerate(rows)]

    # Loaders.

    def train_dataloader(self) -> PlannedLoader[Any]:
        """Shuffled batches that know the trained weight of their optimizer step."""
        self._train_loader = self._loader("train")
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, for a checkpoint: what stands behind the last optimizer step."""
        if self._train_loader is None or self.trainer is None:
            return {}
        at = standing(self.trainer)
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
        self.begun = read_position(
            self._training_plan(), state_dict["train"], self._window(state_dict["train"]["epoch"])
        )
        if self.begun.changed and isinstance(self.trainer.limit_train_batches, float):
            if self.trainer.limit_train_batches < 1:
                raise ConfigError(
                    "trainer.limit_train_batches is a share, and the checkpoint's epoch was begun with other batches "
                    f"({', '.join(self.begun.changed)}). Give it as a number of batches."
                )

    def update_checkpoint(self, checkpoint: dict[str, Any], stored: dict[str, Any]) -> None:
        """Bring a checkpoint of an earlier version into today's form; `stored` is the data module's part of it."""
        epoch = stored["train"]["epoch"]
        update_position(checkpoint, stored, self._training_plan(), self._window(epoch))

    def epoch_length(self, epoch: int) -> int:
        """Micro-batches of each rank in an epoch, within `limit_train_batches`."""
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
        dataset = self.examples["train"]
        ids = dataset.select_columns(["id"]).with_format("arrow")[:]["id"]
        return identity(column(dataset, "length"), column(dataset, "weight"), ids, self.seed)

    def val_dataloader(self) -> PlannedLoader[Any] | list[Any]:
        """Validation batches in order; none without sources."""
        return self._loader("val") if "val" in self.examples else []

    def test_dataloader(self) -> PlannedLoader[Any]:
        """Test batches in order."""
        return self._loader("test")

    def predict_dataloader(self) -> PlannedLoader[Any]:
        """Prompts that are not answered yet, longest first, so that a batch too large for the memory fails at once."""
        dataset = self.examples["predict"]
        answered = self.answered()
        order = np.argsort(-column(dataset, "length"), kind="stable").tolist()
        if answered:
            keys = list(zip(dataset["dataset"], dataset["id"], strict=True))
            order = [index for index in order if keys[index] not in answered]
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

        build = partial(self._prompts, dataset)
        plan = [PlannedBatch(group, 0.0) for group in groups[rank::world_size]]
        return PlannedLoader(lambda epoch: plan, build, len(plan))

    def __getstate__(self) -> dict[str, Any]:
        """What workers need that are not forked: all but the Trainer and what belongs to it."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_train_loader", "answered")}
        return kept | {"trainer": None, "_train_loader": None, "answered": set}

    def _batch(self, dataset: datasets.Dataset, planned: PlannedBatch) -> Any:
        columns = dataset[planned.indices]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = self.collate(rows, planned)
        return replace(batch, window_share=planned.share) if isinstance(batch, Rows) else batch

    def _prompts(self, dataset: datasets.Dataset, planned: PlannedBatch) -> Any:
        return self.predict_collate([self.predict_item(dataset[index], index) for index in planned.indices])

    def plan(self, split: Split) -> BatchPlan:
        """What decides the batches of a split that is loaded."""
        dataset = self.examples[split]
        return BatchPlan(
            lengths=column(dataset, "length"),
            weights=column(dataset, "weight"),
            tokens_per_batch=self.tokens_per_batch if self.packing else None,
            batch_size=self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            repeats=getattr(self.trainer, "overfit_batches", 0) > 0,
        )

    def _loader(self, split: Split) -> PlannedLoader[Any]:
        dataset, plan = self.examples[split], self._training_plan() if split == "train" else self.plan(split)
        rank, ranks = data_rank(self.trainer)

        def batches(epoch: int) -> list[PlannedBatch]:
            if split != "train":
                return plan.batches(plan.groups(0), rank, ranks)
            begun = self._begun(epoch)
            # A limit cuts the last window short, so the plan has to know it.
            groups = plan.left(epoch, begun.stretches)[: (self.epoch_length(epoch) - begun.batches) * ranks]
            return plan.batches(groups, rank, ranks, self._window(epoch).accumulate)

        build = partial(self._batch, dataset)
        pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        begun = Begun(0)
        if split == "train" and self.trainer is not None:
            begun = self._begun(max(self.begun.epoch, self.trainer.current_epoch))
        return PlannedLoader(batches, build, epoch_length(plan, begun, ranks), self.num_workers, pin_memory)


def data_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Whose batches a process trains on, and the number of those who have different ones."""
    given = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if given is None else (given["rank"], given["num_replicas"])


def datamodule_of(trainer: Trainer) -> AlignmentDataModule:
    """The data module that a trainer runs on.

    Raises:
        ConfigError: If there is none, or it is not one of ours.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, AlignmentDataModule):
        raise ConfigError(f"a data module of lit_alignment is needed here, not {type(datamodule).__name__}.")
    return datamodule
