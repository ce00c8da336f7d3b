"""Responses and how good they are, for reward models and whatever else learns from preferences."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import Sequences
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.example import Dropped, Example
from lit_alignment.data.encoding.feedback import Feedback, read_feedback
from lit_alignment.data.encoding.messages import IGNORE_INDEX
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.encoding.responses import ResponseEncoder
from lit_alignment.data.encoding.rows import ROW_FEATURES
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import RecordError

FeedbackKind = Literal["preferences", "outcomes", "steps"]

IDS = datasets.List(datasets.Value("int32"))
STRING = datasets.Value("string")
RESPONSE_FEATURES = {"prompt": IDS, "responses": datasets.List(IDS)}
TEXTS = ("messages", "answers", "scores", "label", "meta")  # of an item, as JSON


@dataclass(kw_only=True)
class FeedbackItem(Item):
    """A prompt with its responses.

    Args:
        sequences: Their ids.
        answers: The responses as `{id, content}`.
        scores: How good each is, higher is better; None where nothing is known.
    """

    sequences: Sequences
    answers: list[dict[str, Any]]
    scores: list[float | None]


class FeedbackDataModule(ConversationDataModule):
    """Prompts with one or more responses, each with a score: higher is better.

    All responses of a record follow the same prompt ids and stand in the same batch; in a packed row they share one
    copy of the prompt. Records are those that `read_feedback` knows.

    Args:
        tokenizer: The model's tokenizer.
        kind: What is known: `preferences` compares the responses of a record, `outcomes` judges each response alone.
        share_prompts: In a packed row, read a prompt once for all its responses.
        **settings: As of AlignmentDataModule.
    """

    encoder_type = ResponseEncoder
    encoder: ResponseEncoder
    lengths_in_row = 2

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: FeedbackKind = "preferences",
        share_prompts: bool = True,
        **settings: Any,
    ) -> None:
        """Check the settings; files are read in `prepare_data`."""
        super().__init__(tokenizer, **settings)
        self.kind, self.share_prompts = kind, share_prompts and self.packing
        self._counts_prompts_once = share_prompts  # padded, too: a run may be resumed with rows of the other kind

    def read(self, raw: object, where: str, position: int) -> Feedback:
        """A prompt with its responses."""
        return read_feedback(raw, where, position)

    def decides_encoding(self) -> list[Any]:
        """Also what the records hold, and how their length is counted."""
        return [*super().decides_encoding(), self.kind, self._counts_prompts_once]

    @property
    def features(self) -> datasets.Features:
        """Columns of an encoded record."""
        return datasets.Features(
            {
                **ROW_FEATURES,
                **RESPONSE_FEATURES,
                "scores": datasets.List(datasets.Value("float32")),
                "margin": datasets.Value("float32"),
                "subset": STRING,
                "weight": datasets.Value("float64"),
            }
        )

    def encode_record(self, record: Feedback, source: SourceConfig) -> dict[str, Any]:
        """Ids of one record's prompt and responses, and their scores."""
        scores = self.scores(record)
        return {
            **self.sequences(record, source),
            "scores": scores,
            "margin": record.margin or 0.0,
            "subset": record.subset or "",
            "weight": 1.0,  # every record weighs the same
        }

    def scores(self, record: Feedback) -> list[float]:
        """The score of each response.

        Raises:
            RecordError: If the record says nothing, or something of another kind.
            Dropped: If nothing can be learned from it.
        """
        scores = [response["score"] for response in record.responses if response["score"] is not None]
        if not scores or len(scores) < len(record.responses):
            missing = "ranking" if self.kind == "preferences" else "label"
            raise RecordError(
                record.where, missing, "is missing", "Give it, or set data.kind to what the records hold."
            )
        if len(scores) == 1 and self.kind == "preferences" and not record.alone:
            raise Dropped("nothing_to_prefer")  # of several answers all were the same
        if (len(scores) > 1) != (self.kind == "preferences"):
            problem = f"the record has {len(scores)} response(s), which data.kind: {self.kind} does not take"
            raise RecordError(record.where, "", problem, "Set data.kind to what the records hold.")
        if self.kind == "preferences":
            texts = [json.dumps(response["messages"], sort_keys=True) for response in record.responses]
            if len(set(scores)) < 2 or len(set(texts)) < 2:
                raise Dropped("nothing_to_prefer")
        return scores

    def sequences(self, record: Feedback, source: SourceConfig, allow_empty: bool = False) -> dict[str, Any]:
        """`length` and RESPONSE_FEATURES of a record.

        Args:
            record: The prompt and its responses.
            source: Where it is from.
            allow_empty: Also take a response without text.
        """
        messages = [response["messages"] for response in record.responses]
        examples = self.encoder.encode_responses(record, messages, source.system_prompt, allow_empty)
        start = _shared_start(examples)
        sequences = Sequences(examples[0].input_ids[:start], [example.input_ids[start:] for example in examples])
        return {
            "length": sequences.num_tokens(self._counts_prompts_once),
            "prompt": sequences.prompt,
            "responses": sequences.responses,
            **self.response_columns(examples, start),
        }

    def response_columns(self, examples: list[Example], start: int) -> dict[str, Any]:
        """What a method keeps of each response besides its ids.

        Args:
            examples: The prompt with each response.
            start: Where the responses begin in them.
        """
        return {}

    # What predict reads.

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a record without what is learned from it."""
        return datasets.Features({**ROW_FEATURES, **RESPONSE_FEATURES, **dict.fromkeys(TEXTS, STRING)})

    def predict_row(self, record: Feedback, source: SourceConfig) -> dict[str, Any]:
        """Ids of a record's prompt and responses, and the record itself."""
        meta = record.meta
        if record.subset is not None:
            meta = {"subset": record.subset, **(meta if isinstance(meta, dict) else {})}
        texts = {
            "messages": record.messages,
            "answers": [{"id": r["id"], "content": r["messages"][-1]["content"]} for r in record.responses],
            "scores": [response["score"] for response in record.responses],
            "label": record.label,
            "meta": meta,
        }
        columns = self.sequences(record, source, allow_empty=True)
        return {**columns, **{name: json.dumps(value) for name, value in texts.items()}}

    def predict_item(self, row: dict[str, Any], index: int) -> Item:
        """One row of `predict_features`."""
        return FeedbackItem(
            index=index,
            id=row["id"],
            dataset=row["dataset"],
            sequences=Sequences(row["prompt"], row["responses"]),
            **{name: json.loads(row[name]) for name in TEXTS},
        )


def _shared_start(examples: list[Example]) -> int:
    """Number of ids before the first trained token, which all examples have in common."""
    trained = [
        [i for i, label in enumerate(e.labels) if label != IGNORE_INDEX] or [len(e.labels) - 1] for e in examples
    ]
    start = min(places[0] for places in trained)
    prompts = {tuple(example.input_ids[:start]) for example in examples}
    if len(prompts) != 1:
        raise Dropped("prompts_differ", "the template renders the prompt differently before each response")
    return start
