"""Conversations with a class, several classes, or numbers."""

from typing import Any, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import ScoreBatch, Sequences, pack_sequences, pad_sequences
from lit_alignment.data.batching.items import ItemBatch
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record, finite
from lit_alignment.data.encoding.prompts import prompt_columns
from lit_alignment.data.encoding.rows import ROW_FEATURES
from lit_alignment.data.examples import column
from lit_alignment.data.labels import class_index
from lit_alignment.data.sources.record_batches import CachedRows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError

Problem = Literal["single_label", "multi_label", "regression"]


class ClassificationDataModule(ConversationDataModule):
    """Conversations with their labels, as batches whose last tokens are classified.

    Records are `{id?, messages, label, meta?}`, or `{text, label}` for one message of a user. A label is a name of the
    model's labels, also where that is a number, or else its index; a list of them with `multi_label`; a number, or a
    list of as many as there are labels, with `regression`.

    Args:
        tokenizer: The model's tokenizer.
        labels: The model's labels; the command line passes them on.
        problem: The model's kind of labels; the command line passes it on.
        **settings: As of AlignmentDataModule.
    """

    marked = "scored"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str] | None = None,
        problem: Problem = "single_label",
        **settings: Any,
    ) -> None:
        """Check the settings; files are read in `prepare_data`."""
        super().__init__(tokenizer, **settings)
        if not labels:
            raise ConfigError("ClassificationDataModule needs the model's labels.")
        self.labels, self.problem = labels, problem

    def read(self, raw: object, where: str, position: int) -> Record:
        """One conversation, or a text of a user's."""
        if isinstance(raw, dict) and "text" in raw and "messages" not in raw:
            raw = {**raw, "messages": [{"role": "user", "content": raw["text"]}]}
        return super().read(raw, where, position)

    def decides_encoding(self) -> list[Any]:
        """Also the labels."""
        return [*super().decides_encoding(), self.labels, self.problem]

    @property
    def features(self) -> datasets.Features:
        """Columns of an encoded conversation."""
        return datasets.Features(
            {
                **ROW_FEATURES,
                "input_ids": datasets.List(datasets.Value("int32")),
                "target": datasets.List(datasets.Value("float32")),
                "weight": datasets.Value("float64"),
            }
        )

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Ids and target of one conversation."""
        target = self.target(record)
        ids = self.encoder.encode_conversation(record, source.system_prompt).input_ids
        return {"length": len(ids), "input_ids": ids, "target": target, "weight": 1.0}

    def predict_row(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Ids of a conversation, and what is known of it."""
        return prompt_columns(record, self.encoder.encode_conversation(record, source.system_prompt))

    def predict_collate(self, items: list[Any]) -> ItemBatch:
        """The conversations and their tokens."""
        return ItemBatch(items, self._scores([item.input_ids for item in items]))

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> ScoreBatch:
        """The conversations, in one packed row or padded, with their targets."""
        batch = self._scores([row["input_ids"] for row in rows])
        targets = torch.tensor([row["target"] for row in rows])
        batch.targets = targets[:, 0].long() if self.problem == "single_label" else targets
        batch.weights = torch.full((len(rows),), 0.0 if planned.dummy else 1.0)
        batch.window_weight = planned.window_weight
        batch.ids = [f"{row['dataset']}/{row['id']}" for row in rows]
        return batch

    def _scores(self, conversations: list[list[int]]) -> ScoreBatch:
        items = [Sequences([], [ids]) for ids in conversations]
        if self.packing:
            rows, begins = pack_sequences(items, share=False)
        else:
            rows, begins = pad_sequences(items, int(self.tokenizer.pad_token_id))
        ends = [begin + len(ids) - 1 for begin, ids in zip(begins, conversations, strict=True)]
        return ScoreBatch(
            **vars(rows),
            read_at=torch.tensor(ends),
            targets=torch.zeros(0),
            groups=[1] * len(items),
            weights=torch.ones(len(items)),
        )

    def classes(self, rows: CachedRows) -> NDArray[np.float64]:
        """The class of each row, or its set of them."""
        if self.problem == "regression":
            return super().classes(rows)
        own: dict[str, int] = {}
        return np.array([own.setdefault(str(target), len(own)) for target in rows["target"]], dtype=np.float64)

    def class_counts(self) -> torch.Tensor:
        """Training examples of each label, [K].

        Raises:
            ConfigError: If labels are numbers and nothing can be counted.
        """
        if self.problem == "regression":
            raise ConfigError("model.class_weights: numbers have no classes to weigh. Remove it.")
        targets = column(self.examples["train"], "target")
        if self.problem == "multi_label":
            return torch.tensor(targets).double().sum(0)
        return torch.bincount(torch.tensor(targets[:, 0]).long(), minlength=len(self.labels))

    def target(self, record: Record) -> list[float]:
        """A record's label as numbers: the class's index; 0 or 1 a label; or the quantities themselves.

        Raises:
            RecordError: If it is missing, unknown, or of another kind.
        """
        if record.label is None:
            raise RecordError(record.where, "label", "is missing", f"Give one of {self._known()}.")
        match self.problem:
            case "single_label":
                return [float(self._index(record.label, "label", record.where))]
            case "multi_label":
                if not isinstance(record.label, list):
                    raise RecordError(
                        record.where, "label", f"is {record.label!r}", "Give the list of those that apply."
                    )
                applying = {self._index(v, f"label[{i}]", record.where) for i, v in enumerate(record.label)}
                return [float(index in applying) for index in range(len(self.labels))]
            case "regression":
                values = record.label if isinstance(record.label, list) else [record.label]
                numbers = [number for number in map(finite, values) if number is not None]
                if not len(numbers) == len(values) == len(self.labels):
                    what = "a finite number" if len(self.labels) == 1 else f"{len(self.labels)} finite numbers"
                    raise RecordError(record.where, "label", f"is {record.label!r}", f"Give {what}.")
                return numbers

    def _index(self, label: object, field: str, where: str) -> int:
        index = class_index(label, self.labels)
        if index is None:
            raise RecordError(where, field, f"is {label!r}", f"Give one of {self._known()}.")
        return index

    def _known(self) -> str:
        if self.problem == "regression":
            return "the numbers to predict"
        shown = ", ".join(f"'{label}'" for label in self.labels[:8]) + (", ..." if len(self.labels) > 8 else "")
        return f"{shown}, or a number from 0 to {len(self.labels) - 1}; model.labels lists them"

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """The conversation; marked is the token at which it is classified."""
        ids = row["input_ids"]
        labels = [*[IGNORE_INDEX] * (len(ids) - 1), ids[-1]]
        return [(self._named(row.get("target")), Example(ids, labels, [1.0] * len(ids)))]

    def _named(self, target: list[float] | None) -> str:
        match self.problem if target else None:
            case "single_label":
                return self.labels[int((target or [0])[0])]
            case "multi_label":
                return ", ".join(name for name, on in zip(self.labels, target or [], strict=True) if on)
            case "regression":
                return ", ".join(f"{value:g}" for value in target or [])
            case _:
                return ""
