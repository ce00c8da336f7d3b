"""Prompts for distillation, and the responses that records have to them."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from lit_alignment.data.base import USES, Split
from lit_alignment.data.batching.collate import trained_positions
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.encoding.example import Dropped, Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record
from lit_alignment.data.examples import column
from lit_alignment.data.rollout import Answer, Group, PromptRecord, RolloutBatch, RolloutDataModule
from lit_alignment.data.sources.record_batches import IndexedRows
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError

UNANSWERED = ("no_trained_message", "no_trained_token")


class DistillationDataModule(RolloutDataModule):
    """Prompts of chat records, of which the student answers a share, and the others train on the records' responses.

    What of a record is trained are the tokens that SFTDataModule trains; validation and test are on these alone.
    Settings are those of RolloutDataModule.
    """

    on_policy_share = 1.0  # of the prompts; the module says another

    # Records.

    @property
    def features(self) -> datasets.Features:
        """Columns of a training prompt, with the record's own example."""
        own = {
            "own_ids": datasets.List(datasets.Value("int32")),
            "own_weights": datasets.List(datasets.Value("float32")),
            "num_trained": datasets.Value("int64"),
        }
        return datasets.Features({**super().features, **own})

    def encode_record(self, record: PromptRecord, source: SourceConfig) -> dict[str, Any]:
        """The prompt of a conversation, and the whole of it with the weights of its trained tokens, if it has some."""
        columns = super().encode_record(record, source)
        try:
            example = self.encoder.encode(record, source.system_prompt)
        except Dropped as drop:
            if drop.reason not in UNANSWERED:
                raise
            example = Example([], [], [])
        trained = {t for t in trained_positions(example) if example.weights[t] > 0}
        return columns | {
            "length": max(columns["length"], len(example.input_ids)),
            "own_ids": example.input_ids,
            "own_weights": [weight if t in trained else 0.0 for t, weight in enumerate(example.weights)],
            "num_trained": len(trained),
            "notes": [note for note, number in example.notes.items() for _ in range(number)],
        }

    def split_record(self, record: Record) -> list[Record]:
        """A record for each trained response."""
        return self.encoder.split_turns(record)

    def require_responses(self, split: Split) -> None:
        """Refuse a split in which records have no response of their own.

        Raises:
            ConfigError: With their number.
        """
        trained = column(self.examples[split], "num_trained")
        without = int((trained == 0).sum())
        if not without:
            return
        instead = ", or set model.on_policy_share to 1" if split == "train" else ""
        raise ConfigError(
            f"data.{split}: {without} of {len(trained)} records have no response of their own to {USES[split]}. "
            f"Add it, or leave these records out{instead}."
        )

    # Batches.

    def val_dataloader(self) -> PlannedLoader[Any] | list[Any]:
        """The records' own responses, in order; none without sources."""
        return self._loader("val") if "val" in self.examples else []

    def test_dataloader(self) -> PlannedLoader[Any]:
        """The records' own responses, in order."""
        return self._loader("test")

    def groups_of(self, indices: list[int], rows: IndexedRows, steps: Sequence[PlannedBatch]) -> list[Group]:
        """Responses of the source to its share of the prompts, and the records' own to the others."""
        chosen = {index for step in steps for index in self.on_policy(step)}
        sampled = [index for index in indices if index in chosen]
        groups = super().groups_of(sampled, rows, steps) if chosen else []
        own = [index for index in indices if index not in chosen]
        read = rows.rows(own) if own else []
        return [*groups, *(own_response(row, index) for row, index in zip(read, own, strict=True))]

    def on_policy(self, step: PlannedBatch) -> list[int]:
        """The prompts of an optimizer step, on all ranks, that the student answers; drawn anew in each epoch.

        Their number is the share of all, rounded at random to one of the whole numbers beside it, so that it is right
        on average where it cannot be right in each step.

        Args:
            step: Its first micro-batch.
        """
        prompts = sorted(index for group in step.window or () for index in group)
        generator = np.random.default_rng([self.seed, self._epoch, *prompts])
        number = int(self.on_policy_share * len(prompts) + generator.random())
        return [int(index) for index in generator.permutation(prompts)[:number]]

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> RolloutBatch:
        """Responses of the step's rollout; in validation and test the records' own."""
        if planned.window is not None or planned.dummy:
            return super().collate(rows, planned)
        groups = [own_response(row, index) for row, index in zip(rows, planned.indices, strict=True)]
        return self.batch(groups, [f"{row['dataset']}/{row['id']}" for row in rows])

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """The prompt, and the record's own example."""
        labels = [token if w else IGNORE_INDEX for token, w in zip(row["own_ids"], row["own_weights"], strict=True)]
        own = Example(row["own_ids"], labels, row["own_weights"])
        return [*super().views(row), *([("own response", own)] if row["num_trained"] else [])]


def own_response(row: dict[str, Any], index: int) -> Group:
    """What a record's own tokens are trained as: one response behind all that stands before the first of them.

    Args:
        row: The encoded record.
        index: Of the record.
    """
    ids, weights = list(row["own_ids"]), list(row["own_weights"])
    first = next(t for t, weight in enumerate(weights) if weight > 0)
    answer = Answer(token_ids=ids[first:], text="", truncated=False, weights=weights[first:])
    return Group(index=index, prompt=ids[:first], answers=[answer])
