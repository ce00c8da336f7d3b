"""What every data module does: read, choose, encode once into a cache, report what was dropped, deal to ranks."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig, Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record, read_record
from lit_alignment.data.encoding.prompts import (
    PROMPT_FEATURES,
    Item,
    ItemBatch,
    PromptBatch,
    prompt_item,
    prompt_row,
)
from lit_alignment.data.encoding.rows import RowEncoder
from lit_alignment.data.encoding.templates import JinjaTemplate, PrefixSuffixTemplate
from lit_alignment.data.sources.cache import cached_dataset, fingerprint, source_fingerprint, tokenizer_fingerprint
from lit_alignment.data.sources.choosing import choose_records, mixture_repeats, repeat_records, source_generator
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.sources.report import DataReport, write_reports
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.paths import cache_dir as default_cache_dir

Split = Literal["train", "val", "test", "predict"]
SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}

RECORD_FEATURES = datasets.Features({name: datasets.Value("string") for name in ("id", "where", "record")})


class AlignmentDataModule(LightningDataModule):
    """Sources, cache, report, prompts and loaders; a method adds how a record becomes an example and a batch.

    Args:
        tokenizer: The model's tokenizer.
        train: Sources of the training split.
        val: Sources of the validation split.
        test: Sources of the test split.
        predict: Sources of prompts.
        encoding: How conversations become examples.
        packing: Train and validate on rows that hold several examples, each attending to itself only.
        tokens_per_batch: Tokens in a packed row; `encoding.max_length` by default.
        batch_size: Examples in an unpacked batch, and prompts in a predict batch.
        num_workers: Processes that build batches ahead; building is cheap, so 0 is usually best.
        num_proc: Processes that encode.
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
        num_proc: int = 1,
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
        self.encoder = self.encoder_type(tokenizer, encoding, seed)
        self.packing = packing
        self.tokens_per_batch = tokens_per_batch or encoding.max_length
        if packing and self.tokens_per_batch < encoding.max_length:
            raise ConfigError(
                f"data.tokens_per_batch is {tokens_per_batch}, less than encoding.max_length "
                f"{encoding.max_length}: a single example might not fit. Raise the one or lower the other."
            )
        if batch_size < 1:
            raise ConfigError(f"data.batch_size is {batch_size}; use 1 or more.")
        self.batch_size, self.num_workers, self.num_proc = batch_size, num_workers, num_proc
        self.seed, self.on_drop = seed, on_drop
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir() / "data"
        self.examples: dict[str, datasets.Dataset] = {}
        self.reports: dict[str, DataReport] = {}
        self._train_loader: PlannedLoader[Any] | None = None
        self._resume_at: dict[str, int] | None = None
        # Gives (dataset, id) of prompts that need no answer any more; asked when the loader is made.
        self.answered: Callable[[], set[tuple[str, str]]] = set

    # What a method adds.

    record_type: type[Record] = Record
    encoder_type: type[Encoder] = Encoder
    marked = "trained"  # what the labels of `views` say of a token
    share_prompts = False  # whether responses in a packed row go on from one copy of their prompt

    def read(self, raw: object, where: str, position: int) -> Record:
        """One raw record, validated, as `record_type`."""
        return read_record(raw, where, position)

    @property
    @abstractmethod
    def features(self) -> datasets.Features:
        """Columns of an encoded example: ROW_FEATURES, `weight`, and the method's own."""

    @abstractmethod
    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
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
        return PROMPT_FEATURES

    def predict_row(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Columns of what a record asks in predict, without ROW_FEATURES' own except `length`.

        Raises:
            Dropped: If there is nothing to ask.
        """
        return prompt_row(self.encoder, record, source)

    def predict_item(self, row: dict[str, Any], index: int) -> Item:
        """One row of `predict_features`; `index` is its place among all."""
        return prompt_item(row, index)

    def predict_collate(self, items: list[Any]) -> PromptBatch | ItemBatch:
        """What `predict_step` gets."""
        return PromptBatch(items)

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """The token sequences of one encoded row, each with its name, for people to look at."""
        ids = row["input_ids"]
        labels = row.get("labels", [IGNORE_INDEX] * len(ids))
        return [("", Example(ids, labels, row.get("weights", [0.0] * len(ids))))]

    # Reading and encoding.

    def prepare_data(self) -> None:
        """Encode into the cache on one process, so that the others only map the files."""
        running = None if self.trainer is None else self.trainer.state.fn
        for split in self._needed("fit" if running is None else str(running.value)):
            for source in self.sources[split]:
                self._encoded(source, split)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage and report what became of their records."""
        for split in self._needed(stage):
            dataset, report = self._load(split)
            self.examples[split], self.reports[split] = dataset, report
            rank_zero_info(report.line())
            if self.on_drop == "error" and report.dropped:
                raise ConfigError(f"data.on_drop is 'error' and records were dropped. {report.line()}")
            if len(dataset) == 0:
                raise ConfigError(f"nothing to {stage} on. {report.line()}")
        # log_dir is agreed among ranks, so every rank must ask for it.
        directory = self.trainer.log_dir if self.trainer is not None else None
        if directory and self.trainer is not None and self.trainer.is_global_zero:
            write_reports(self.reports, Path(directory))

    def _needed(self, stage: str) -> list[Split]:
        splits = SPLITS[stage]
        if not self.sources[splits[0]]:
            raise ConfigError(f"data.{splits[0]} is empty: give at least one source to {stage} on.")
        return [split for split in splits if self.sources[split]]

    def _load(self, split: Split) -> tuple[datasets.Dataset, DataReport]:
        report = DataReport(split)
        parts = []
        for source in self.sources[split]:
            encoded = self._encoded(source, split)
            report.sources[source.title] = report.sources.get(source.title, 0) + len(encoded)
            reasons = np.array(encoded["dropped"], dtype=object)
            report.dropped.update(reason for reason in reasons if reason)
            for reason, detail in zip(reasons, encoded["detail"], strict=True):
                if detail:
                    report.details.setdefault(reason, detail)
            parts.append(encoded.select(np.flatnonzero(reasons == "")))
        repeats = mixture_repeats(self.sources[split], [len(part) for part in parts])
        mixed = []
        for source, part, repeat in zip(self.sources[split], parts, repeats, strict=True):
            indices = repeat_records(np.arange(len(part)), repeat, source_generator(source, self.seed, "repeat"))
            mixed.append(part.select(indices))
        dataset = datasets.concatenate_datasets(mixed)
        lengths = np.array(dataset["length"], dtype=np.int64)
        report.examples, report.tokens = len(dataset), int(lengths.sum())
        report.longest = int(lengths.max(initial=0))
        if "num_trained" in dataset.column_names:
            report.trained_tokens = int(np.sum(dataset["num_trained"]))
        return dataset, report

    def _records(self, source: SourceConfig) -> datasets.Dataset:
        """The validated records of a source."""
        name = fingerprint(self.record_type.__name__, source_fingerprint(source), source.title)
        path = self.cache_dir / f"records-{name}.arrow"

        def rows() -> Iterator[dict[str, Any]]:
            seen: dict[str, str] = {}
            for position, (where, raw) in enumerate(source.read()):
                record = self.read(raw, where, position)
                if record.id in seen:
                    raise RecordError(
                        where, "id", f"'{record.id}' is also the id of {seen[record.id]}", "Give each record its own."
                    )
                seen[record.id] = where
                yield {"id": record.id, "where": where, "record": json.dumps(vars(record))}

        return cached_dataset(path, rows, RECORD_FEATURES)

    def decides_encoding(self) -> list[Any]:
        """What decides the columns of an example besides tokenizer, template and `encoding`, for the cache's names."""
        return [type(self).__name__]

    def _encoded(self, source: SourceConfig, split: Split) -> datasets.Dataset:
        """The examples, or prompts, of a source's chosen records; dropped ones carry their reason."""
        records = self._records(source)
        records = records.select(choose_records(source, len(records), self.seed))
        prompts = split == "predict"
        name = fingerprint(
            "predict" if prompts else "train",
            self.decides_encoding(),
            source_fingerprint(source),
            asdict(source),
            tokenizer_fingerprint(self.tokenizer),
            asdict(self.encoder.config),
            getattr(self.encoder.template, "source", ""),
            self.seed,
        )
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        return records.map(
            self._row_encoder(source, prompts),
            remove_columns=records.column_names,
            features=self.predict_features if prompts else self.features,
            cache_file_name=str(self.cache_dir / f"examples-{name}.arrow"),
            new_fingerprint=name,
            num_proc=self.num_proc if self.num_proc > 1 and len(records) > self.num_proc else None,
            desc=f"Encoding {source.title}",
        )

    def _row_encoder(self, source: SourceConfig, prompts: bool) -> RowEncoder:
        if prompts:
            return RowEncoder(source, self.record_type, self.predict_row, self.predict_features)
        return RowEncoder(source, self.record_type, self.encode_record, self.features)

    def predict_items(self, sources: Sequence[SourceConfig]) -> list[Any]:
        """What any sources ask in predict, in order, without a cache: for cherry picks."""
        items: list[Item] = []
        for source in sources:
            raw = list(source.read())
            for position in choose_records(source, len(raw), self.seed):
                where, record = raw[position]
                row = self._row_encoder(source, True).encode(self.read(record, where, int(position)))
                if not row["dropped"]:
                    items.append(self.predict_item(row, len(items)))
        return items

    def chat_template(self) -> str | None:
        """What conversations are rendered with, as a Jinja template to be saved with the model."""
        match self.encoder.template:
            case JinjaTemplate(source=source):
                return source
            case PrefixSuffixTemplate() as template:
                return template.as_jinja()
            case _:
                return None

    # Loaders.

    def train_dataloader(self) -> PlannedLoader[Any]:
        """Shuffled batches that know the trained weight of their optimiser step."""
        self._train_loader = self._loader("train")
        if self._resume_at is not None:
            self._train_loader.resume(self._resume_at)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data, for a checkpoint."""
        return {} if self._train_loader is None else {"train": self._train_loader.position()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a checkpoint's place; sharded strategies restore when the loader is there already."""
        self._resume_at = state_dict.get("train")
        if self._train_loader is not None and self._resume_at is not None:
            self._train_loader.resume(self._resume_at)

    def val_dataloader(self) -> PlannedLoader[Any] | list[Any]:
        """Validation batches in order; none without sources."""
        return self._loader("val") if "val" in self.examples else []

    def test_dataloader(self) -> PlannedLoader[Any]:
        """Test batches in order."""
        return self._loader("test")

    def predict_dataloader(self) -> PlannedLoader[PromptBatch | ItemBatch]:
        """Prompts that are not answered yet, longest first, so that a batch too large for the memory fails at once."""
        dataset = self.examples["predict"]
        answered = self.answered()
        keys = zip(dataset["dataset"], dataset["id"], strict=True)
        open_ones = [index for index, key in enumerate(keys) if key not in answered]
        lengths = np.array(dataset["length"], dtype=np.int64)
        order = sorted(open_ones, key=lambda index: -lengths[index])
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

        def build(planned: PlannedBatch) -> PromptBatch | ItemBatch:
            return self.predict_collate([self.predict_item(dataset[index], index) for index in planned.indices])

        plan = [PlannedBatch(group, 0.0) for group in groups[rank::world_size]]
        return PlannedLoader(lambda epoch: plan, build, len(plan), world_size)

    def plan(self, split: Split) -> BatchPlan:
        """What decides the batches of a split that is loaded."""
        dataset = self.examples[split]
        return BatchPlan(
            lengths=np.array(dataset["length"], dtype=np.int64),
            weights=np.array(dataset["weight"], dtype=np.float64),
            tokens_per_batch=self.tokens_per_batch if self.packing else None,
            batch_size=self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
        )

    def _loader(self, split: Split) -> PlannedLoader[Any]:
        dataset, plan = self.examples[split], self.plan(split)
        rank, world_size = data_rank(self.trainer)
        training = split == "train"
        accumulate = self.trainer.accumulate_grad_batches if training and self.trainer is not None else 1
        length = -(-len(plan.groups(0)) // world_size)

        def batches(epoch: int) -> list[PlannedBatch]:
            # A limit cuts the last window short, so the plan has to know it.
            limit = self._train_limit(length) if training else None
            return plan.batches(epoch, rank, world_size, accumulate, limit)

        def build(planned: PlannedBatch) -> Any:
            columns = dataset[planned.indices]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            return self.collate(rows, planned)

        pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return PlannedLoader(batches, build, length, world_size, self.num_workers, pin_memory)

    def _train_limit(self, available: int) -> int | None:
        """Batches a rank sees under the trainer's `limit_train_batches`."""
        if self.trainer is None:
            return None
        limit = self.trainer.limit_train_batches
        if isinstance(limit, float):
            return None if limit == 1.0 else int(available * limit)
        return int(limit)


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
