"""Conversations for supervised fine-tuning."""

from typing import Any

import datasets

from lit_alignment.data.batching.collate import TargetBatch, collate_packed, collate_padded
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record
from lit_alignment.data.encoding.rows import ROW_FEATURES
from lit_alignment.data.sources.records import SourceConfig


class SFTDataModule(ConversationDataModule):
    """Chat records as token batches whose labels stand on the trained messages.

    Records are `{id?, messages: [{role, content, train?, weight?}], label?, meta?, tools?}`, or one of the other
    chat forms that `read_record` knows. Settings are those of AlignmentDataModule.
    """

    streams = True

    @property
    def features(self) -> datasets.Features:
        """Columns of an encoded conversation."""
        return datasets.Features(
            {
                **ROW_FEATURES,
                "input_ids": datasets.List(datasets.Value("int32")),
                "labels": datasets.List(datasets.Value("int32")),
                "weights": datasets.List(datasets.Value("float32")),
                "weight": datasets.Value("float64"),
                "num_trained": datasets.Value("int64"),
            }
        )

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Token ids, labels and weights of one conversation."""
        return self.columns(self.encoder.encode(record, source.system_prompt))

    def split_record(self, record: Record) -> list[Record]:
        """A record for each trained response."""
        return self.encoder.split_turns(record)

    @staticmethod
    def columns(example: Example) -> dict[str, Any]:
        """The columns of an example."""
        return {
            "length": len(example.input_ids),
            "input_ids": example.input_ids,
            "labels": example.labels,
            "weights": example.weights,
            "weight": sum(example.weights[1:]),
            "num_trained": example.num_trained,
            "notes": [note for note, number in example.notes.items() for _ in range(number)],
        }

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> TargetBatch:
        """A packed row, or padded rows."""
        examples = [Example(row["input_ids"], row["labels"], row["weights"]) for row in rows]
        if planned.dummy:  # it takes part in every collective and adds nothing to the loss
            for example in examples:
                example.labels = [IGNORE_INDEX] * len(example.labels)
                example.weights = [0.0] * len(example.weights)
        if self.packing:
            batch = collate_packed(examples, planned.window_weight)
        else:
            batch = collate_padded(examples, int(self.tokenizer.pad_token_id), planned.window_weight)
        batch.ids = [f"{row['dataset']}/{row['id']}" for row in rows]
        return batch
