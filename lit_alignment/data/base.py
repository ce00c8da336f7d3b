"""What every data module does: load the examples of each split, plan their batches, resume inside an epoch."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.batching.streaming import StreamPlan
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.rows import RowEncoder
from lit_alignment.data.encoding.tokenizer import tokenizer_fingerprint
from lit_alignment.data.examples import ExampleMaker, code_fingerprint, column, held_rows
from lit_alignment.data.predicted import PredictDataModule
from lit_alignment.data.sources.choosing import source_generator
from lit_alignment.data.sources.record_batches import CachedRows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.sources.report import DataReport, write_reports
from lit_alignment.data.sources.splitting import check_fraction
from lit_alignment.data.sources.stream import RecordStream, check_stream
from lit_alignment.data.streamed import TrainStream
from lit_alignment.errors import ConfigError
from lit_alignment.paths import cache_dir as default_cache_dir

Data = TypeVar("Data", bound="AlignmentDataModule")
Split = Literal["train", "val", "test", "predict"]
SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}

USES = {"train": "train on", "val": "validate on", "test": "test on", "predict": "predict"}


class AlignmentDataModule(PredictDataModule):
    """Sources, examples and loaders; a method adds how a record becomes an example and a batch.

    Args:
        tokenizer: The model's tokenizer.
        train: Sources of the training split.
        val: Sources of the validation split.
        test: Sources of the test split.
        predict: Sources of what predict is asked: prompts, conversations to classify, responses to score.
        val_fraction: Part of the records of `train` that is held out for validation instead of `val`, at most 0.5: a
            seeded draw from each source, and from each class.
        streaming: Read and encode the training data as the training goes, without a cache and without an end.
        shuffle_buffer: Records of each source that streaming holds to draw the next one from.
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
        val_fraction: float = 0.0,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
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
        self.val_fraction, self.streaming, self.shuffle_buffer = val_fraction, streaming, shuffle_buffer
        self.encoding, self.packing = encoding, packing
        self.tokens_per_batch = tokens_per_batch or self.lengths_in_row * encoding.max_length
        if num_workers < 0:
            raise ConfigError(f"data.num_workers is {num_workers}; use 0 or more.")
        self.batch_size, self.num_workers, self.num_proc = batch_size, num_workers, num_proc
        self.seed, self.on_drop = seed, on_drop
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir() / "data"
        self.examples: dict[str, CachedRows] = {}
        self.reports: dict[str, DataReport] = {}
        self.writes_reports = True  # into the run's folder
        self.check_settings()

    # What a method adds. Records are whatever `read` gives, with an `id` and a `where`.

    lengths_in_row = 1  # a packed row is so many times as long as `encoding.max_length` by default
    marked = "trained"  # what the labels of `views` say of a token
    streams = False  # whether batches of examples can be made without a look at all of them
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
        check_fraction(self.val_fraction, self.sources["train"], self.sources["val"])
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        if not self.streams:
            raise ConfigError(
                f"data.streaming is true, and {type(self).__name__} has to know all its examples before training. Set "
                "it to false; SFTDataModule and PreferenceDataModule can stream."
            )
        if self.val_fraction:
            raise ConfigError("data.val_fraction is drawn from all records, which streaming never has. Give data.val.")
        check_stream(self.sources["train"], self.shuffle_buffer)

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

    def reader(self, source: SourceConfig) -> Callable[[object, str, int], Any]:
        """What reads the records of a source of training, validation or test."""
        return self.read

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

    def asking_settings(self) -> dict[str, Any]:
        """Arguments, as plain values, that decide what a model sees of a question; checkpoints keep them."""
        return {}

    @classmethod
    def read_asking_settings(cls, values: dict[str, Any], where: object) -> dict[str, Any]:
        """The same arguments from a checkpoint.

        Args:
            values: What `asking_settings` gave, of this method's data module or another's.
            where: The checkpoint, for messages.

        Raises:
            CheckpointError: If one has the wrong form.
        """
        return {}

    # Examples.

    def prepare_data(self) -> None:
        """Encode into the cache on one process, so that the others only map the files."""
        running = None if self.trainer is None else self.trainer.state.fn
        for split in self._needed("fit" if running is None else str(running.value)):
            for source in [] if self._is_streamed(split) else self.sources_of(split):
                self._maker(split == "predict").encoded(source)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage and report what became of their records."""
        self.begin()
        for split in self._needed(stage):
            if self._is_streamed(split):
                self.stream, self.reports[split] = self._new_stream()
                continue
            held = self._held_out if self.val_fraction and split in ("train", "val") else None
            dataset, report = self._maker(split == "predict").load(self.sources_of(split), split, held)
            report.remarks = report.remarks if self.reports else self.remarks()  # said once
            self.examples[split], self.reports[split] = dataset, report
            rank_zero_info(report.line())
            if self.on_drop == "error" and report.dropped:
                raise ConfigError(f"data.on_drop is 'error' and records were dropped. {report.line()}")
            if len(dataset) == 0:
                raise ConfigError(
                    f"data.{split}: no example is left, so there is nothing to {USES[split]}. {report.line()}\n"
                    "Change the records, what drops them, or the sources' repeat and weight."
                )
        # Every rank must ask for it: ranks agree on log_dir.
        directory = self.trainer.log_dir if self.trainer is not None and self.writes_reports else None
        if directory and self.trainer is not None and self.trainer.is_global_zero:
            write_reports(self.reports, Path(directory))

    def _is_streamed(self, split: Split) -> bool:
        return self.streaming and split == "train"

    def _new_stream(self) -> tuple[TrainStream, DataReport]:
        """The training data, of which nothing is read yet, and their report, which grows as they are."""
        records = RecordStream(self.sources["train"], self.seed, self.shuffle_buffer)
        plan = StreamPlan(self.tokens_per_batch if self.packing else None, self.batch_size, self.seed)
        stream = TrainStream(records, self._maker(False).rows, plan, stops_at_drop=self.on_drop == "error")
        stream.report.remarks = self.remarks()
        remarks = "".join(f"\n  note: {remark}" for remark in stream.report.remarks)
        names = ", ".join(source.title for source in records.sources)
        rank_zero_info(f"train: {names}, read and encoded as the training goes{remarks}")
        return stream, stream.report

    def _needed(self, stage: str) -> list[Split]:
        splits = SPLITS[stage]
        if not self.sources_of(splits[0]):
            raise ConfigError(f"data.{splits[0]} is empty: give at least one source to {stage} on.")
        return [split for split in splits if self.sources_of(split)]

    def sources_of(self, split: Split) -> list[SourceConfig]:
        """The sources whose records a split has; with `val_fraction` those of training also validate."""
        if split == "val" and self.val_fraction:
            return [source for source in self.sources["train"] if self.validates(source)]
        return self.sources[split]

    def validates(self, source: SourceConfig) -> bool:
        """Whether records of a source of training may be held out for validation."""
        return True

    def classes(self, rows: CachedRows) -> NDArray[np.float64]:
        """The class of each row, of which validation gets its part, [len(rows)]; all alike by default."""
        return np.zeros(len(rows))

    def _held_out(self, source: SourceConfig, rows: CachedRows) -> NDArray[np.bool_]:
        """Which rows of a source are held out for validation."""
        fraction = self.val_fraction if self.validates(source) else 0.0
        return held_rows(rows, self.classes(rows), fraction, source_generator(source, self.seed, "val_fraction"))

    def _maker(self, prompts: bool) -> ExampleMaker:
        """What makes the examples, or the prompts of predict."""
        if prompts:
            rows = self.prompt_rows()
        else:
            rows = RowEncoder(self.reader, self.encode_record, self.features, self.split_record)
        written_in = tuple(kind.__module__ for kind in type(self).__mro__ if issubclass(kind, PredictDataModule))
        decides = ["predict" if prompts else "train", code_fingerprint(written_in), *self.decides_encoding()]
        return ExampleMaker(rows, decides, self.cache_dir, self.seed, self.num_proc)

    # Loaders.

    def val_dataloader(self) -> PlannedLoader[Any] | list[Any]:
        """Validation batches in order; none without sources."""
        return self._loader("val") if "val" in self.examples else []

    def test_dataloader(self) -> PlannedLoader[Any]:
        """Test batches in order."""
        return self._loader("test")

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


def datamodule_of(trainer: Trainer) -> AlignmentDataModule:
    """The data module that a trainer runs on."""
    return datamodule_as(AlignmentDataModule, trainer)  # type: ignore[type-abstract]


def datamodule_as(kind: type[Data], trainer: Trainer) -> Data:
    """The data module that a trainer runs on.

    Raises:
        ConfigError: If there is none, or it is of another kind.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, kind):
        raise ConfigError(f"data: a lit_alignment.{kind.__name__} is needed here, not a {type(datamodule).__name__}.")
    return datamodule
