"""Responses and what is known of them, for reward models."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.base import AlignmentDataModule, Split
from lit_alignment.data.batching.collate import ScoreBatch, Sequences, pack_sequences, pad_sequences
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.encoding.encoder import Dropped, EncodingConfig, Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record
from lit_alignment.data.encoding.prompts import ROW_FEATURES, Item, ItemBatch
from lit_alignment.data.encoding.responses import ResponseEncoder
from lit_alignment.data.feedback import Comparison, read_comparison
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import RecordError

FeedbackKind = Literal["preferences", "outcomes", "steps"]

SEQUENCE_FEATURES = {
    "prompt": datasets.List(datasets.Value("int32")),
    "responses": datasets.List(datasets.List(datasets.Value("int32"))),
    # Places in each response whose scores are read: its last token, or the ends of its steps.
    "read_at": datasets.List(datasets.List(datasets.Value("int32"))),
}


@dataclass(kw_only=True)
class ResponsesItem(Item):
    """A prompt with responses to score.

    Args:
        sequences: Their ids.
        read_at: Places in each response whose scores are read.
        answers: The responses as `{id, content}`.
        values: What is known of each, as in `Comparison`; labels of steps for a response made of steps.
    """

    sequences: Sequences
    read_at: list[list[int]]
    answers: list[dict[str, Any]]
    values: list[float | None]


class RewardDataModule(AlignmentDataModule):
    """Preferences (pairs and rankings), judged responses, or judged steps, as batches of sequences to score.

    All responses of a record follow the same prompt ids and stand in the same batch; in a packed row they share one
    copy of the prompt. Records are those that `read_comparison` knows.

    Args:
        tokenizer: The model's tokenizer.
        kind: What is known: `preferences` compares the responses of a record, `outcomes` judges each response alone,
            `steps` judges each step of a response.
        share_prompts: In a packed row, read a prompt once for all its responses.
        step_separator: What closes each step of `steps`.
        add_labels: Also give the batch token ids of the responses as `labels`, for losses that need them.
        train: Sources of the training split.
        val: Sources of the validation split.
        test: Sources of the test split.
        predict: Sources of responses to score.
        encoding: How conversations become ids; `max_length` is of a prompt with one response.
        packing: Put whole records into one row, each sequence attending to itself and its prompt only.
        tokens_per_batch: Tokens in a packed row; twice `encoding.max_length` by default. A record that is longer
            has a row of its own.
        batch_size: Records in an unpacked batch, and in a predict batch.
        num_workers: Processes that build batches ahead.
        num_proc: Processes that encode.
        seed: Seed of every choice and order.
        on_drop: What to do when a record does not become an example.
        cache_dir: Where encoded data are kept.
    """

    record_type = Comparison
    encoder_type = ResponseEncoder
    encoder: ResponseEncoder
    marked = "scored"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: FeedbackKind = "preferences",
        share_prompts: bool = True,
        step_separator: str = "\n\n",
        add_labels: bool = False,
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
        super().__init__(
            tokenizer,
            train,
            val,
            test,
            predict,
            encoding,
            packing,
            tokens_per_batch or 2 * encoding.max_length,
            batch_size,
            num_workers,
            num_proc,
            seed,
            on_drop,
            cache_dir,
        )
        self.kind, self.step_separator, self.add_labels = kind, step_separator, add_labels
        self.share_prompts = share_prompts and packing

    def read(self, raw: object, where: str, position: int) -> Record:
        """A prompt with its responses."""
        return read_comparison(raw, where, position)

    def decides_encoding(self) -> list[Any]:
        """Also what the records hold, and how their length is counted."""
        return [type(self).__name__, self.kind, self.share_prompts, self.step_separator, self.add_labels]

    @property
    def features(self) -> datasets.Features:
        """Columns of an encoded record."""
        return datasets.Features(
            {
                **ROW_FEATURES,
                **SEQUENCE_FEATURES,
                "targets": datasets.List(datasets.Value("float32")),
                "margin": datasets.Value("float32"),
                "subset": datasets.Value("string"),
                "labels": datasets.List(datasets.List(datasets.Value("int32"))),
                "weight": datasets.Value("float64"),
            }
        )

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Ids of one record's prompt and responses, and what the scores should say."""
        comparison = _comparison(record)
        targets = self._targets(comparison)
        columns, labels = self._sequences(comparison, source)
        return {
            **columns,
            "targets": targets,
            "margin": comparison.margin or 0.0,
            "subset": comparison.subset or "",
            "labels": labels if self.add_labels else [],
            # Every record weighs the same; where steps are judged, every step does.
            "weight": float(len(targets)) if self.kind == "steps" else 1.0,
        }

    def _targets(self, record: Comparison) -> list[float]:
        """One value a score.

        Raises:
            RecordError: If the record says nothing, or something of another kind.
            Dropped: If nothing can be learned from it.
        """
        if self.kind == "steps":
            if not record.step_labels:
                raise RecordError(record.where, "labels", "is missing", "Give 'steps' with 'labels', or set data.kind.")
            return record.step_labels
        values = [r["value"] for r in record.responses if r["value"] is not None]
        if not values or len(values) < len(record.responses):
            missing = {"preferences": "ranking", "outcomes": "label"}[self.kind]
            raise RecordError(
                record.where, missing, "is missing", "Give it, or set data.kind to what the records hold."
            )
        if (len(values) > 1) != (self.kind == "preferences"):
            problem = f"the record has {len(values)} response(s), which data.kind: {self.kind} does not take"
            raise RecordError(record.where, "", problem, "Set data.kind to what the records hold.")
        if self.kind == "preferences":
            texts = [json.dumps(response["message"], sort_keys=True) for response in record.responses]
            if len(set(values)) < 2 or len(set(texts)) < 2:
                raise Dropped("nothing_to_prefer")
        return values

    def _sequences(
        self, record: Comparison, source: SourceConfig, allow_empty: bool = False
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """`length` and SEQUENCE_FEATURES of a record, and the labels of its responses' tokens."""
        if record.steps:
            ids, places = self.encoder.encode_steps(record, record.steps, self.step_separator, source.system_prompt)
            examples = [Example(ids, ids, [1.0] * len(ids))]
            start = 0  # one response shares its prompt with no other
            read_at = [places]
        else:
            messages = [response["message"] for response in record.responses]
            examples = self.encoder.encode_responses(record, messages, source.system_prompt, allow_empty)
            start = _shared_start(examples) if len(examples) > 1 else 0
            read_at = [[len(example.input_ids) - start - 1] for example in examples]
        sequences = Sequences(examples[0].input_ids[:start], [example.input_ids[start:] for example in examples])
        columns = {
            "length": sequences.num_tokens(self.share_prompts),
            "prompt": sequences.prompt,
            "responses": sequences.responses,
            "read_at": read_at,
        }
        return columns, [example.labels[start:] for example in examples]

    def plan(self, split: Split) -> BatchPlan:
        """What decides the batches; a record is never split, so the longest decides how long a row may be."""
        if self.packing and len(self.examples[split]):
            longest = int(np.max(self.examples[split]["length"]))
            self.tokens_per_batch = max(self.tokens_per_batch, longest)
        return super().plan(split)

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> ScoreBatch:
        """All responses of the records, in one packed row or padded."""
        batch = self._scores(
            [Sequences(row["prompt"], row["responses"]) for row in rows],
            [row["read_at"] for row in rows],
            [row["labels"] for row in rows],
        )
        batch.targets = torch.tensor([target for row in rows for target in row["targets"]])
        batch.margins = torch.tensor([row["margin"] for row in rows])
        batch.weights = torch.full((len(rows),), 0.0 if planned.filler else 1.0)
        batch.subsets = [row["subset"] for row in rows]
        batch.window_weight = planned.window_weight
        batch.ids = [f"{row['dataset']}/{row['id']}" for row in rows]
        return batch

    def _scores(
        self, items: list[Sequences], read_at: list[list[list[int]]], labels: list[list[list[int]]] | None = None
    ) -> ScoreBatch:
        if self.packing:
            rows, begins = pack_sequences(items, self.share_prompts)
        else:
            rows, begins = pad_sequences(items, int(self.tokenizer.pad_token_id))
        places = [place for record in read_at for place in record]
        batch = ScoreBatch(
            **vars(rows),
            read_at=torch.tensor([begin + p for begin, ps in zip(begins, places, strict=True) for p in ps]),
            targets=torch.zeros(0),
            groups=[sum(map(len, record)) for record in read_at],
            weights=torch.ones(len(items)),
        )
        if labels is not None and self.add_labels:
            batch.labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
            flat = batch.labels.view(-1)
            for begin, row in zip(begins, (row for record in labels for row in record), strict=True):
                flat[begin : begin + len(row)] = torch.tensor(row)
        return batch

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """Each response behind its prompt; marked are the tokens at which a score is read."""
        views = []
        for number, (response, places) in enumerate(zip(row["responses"], row["read_at"], strict=True)):
            ids = row["prompt"] + response
            labels = [IGNORE_INDEX] * len(ids)
            for place in places:
                labels[len(row["prompt"]) + place] = ids[len(row["prompt"]) + place]
            known = [f"{value:g}" for value in row.get("targets", [])]
            known = known if self.kind == "steps" else known[number : number + 1]
            views.append((f"response {number} ({', '.join(known)})", Example(ids, labels, [1.0] * len(ids))))
        return views

    # What predict scores.

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a record whose responses are scored."""
        texts = {name: datasets.Value("string") for name in ("messages", "answers", "values", "label", "meta")}
        return datasets.Features({**ROW_FEATURES, **SEQUENCE_FEATURES, **texts})

    def predict_row(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Ids of a record's prompt and responses, and the record itself."""
        comparison = _comparison(record)
        columns, _ = self._sequences(comparison, source, allow_empty=True)
        answers = [{"id": r["id"], "content": r["message"]["content"]} for r in comparison.responses]
        values: list[float | None] = [r["value"] for r in comparison.responses]
        if comparison.steps:
            answers = [{"id": "0", "content": "".join(step + self.step_separator for step in comparison.steps)}]
            values = list(comparison.step_labels)
        meta = comparison.meta
        if comparison.subset is not None:
            meta = {"subset": comparison.subset, **(meta if isinstance(meta, dict) else {})}
        texts = {"messages": comparison.messages, "answers": answers, "values": values}
        texts |= {"label": comparison.label, "meta": meta}
        return {**columns, **{name: json.dumps(value) for name, value in texts.items()}}

    def predict_item(self, row: dict[str, Any], index: int) -> ResponsesItem:
        """One row of `predict_features`."""
        loaded = {name: json.loads(row[name]) for name in ("messages", "answers", "values", "label", "meta")}
        return ResponsesItem(
            index=index,
            id=row["id"],
            dataset=row["dataset"],
            sequences=Sequences(row["prompt"], row["responses"]),
            read_at=row["read_at"],
            **loaded,
        )

    def predict_collate(self, items: list[Any]) -> ItemBatch:
        """All responses of the records, to score in one forward pass."""
        return ItemBatch(items, self._scores([i.sequences for i in items], [i.read_at for i in items]))


def _comparison(record: Record) -> Comparison:
    if not isinstance(record, Comparison):
        raise TypeError(f"{type(record).__name__} is not a comparison.")
    return record


def _shared_start(examples: list[Example]) -> int:
    """Number of ids before the first trained token, which all examples have in common."""
    trained = [
        [i for i, label in enumerate(e.labels) if label != IGNORE_INDEX] or [len(e.labels) - 1] for e in examples
    ]
    start = min(places[0] for places in trained)
    prompts = {tuple(example.input_ids[:start]) for example in examples}
    if len(prompts) != 1:
        raise TypeError("the responses of a record do not follow the same prompt ids.")
    return start


def _first_trained(example: Example) -> int:
    """Place of the first trained token; of an empty response without a trained end the last place."""
    trained = (i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
    return next(trained, len(example.labels) - 1)
