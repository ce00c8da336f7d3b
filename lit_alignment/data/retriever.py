"""Passages to encode, and questions with their passages for the warm-up of a retriever."""

import json
from dataclasses import dataclass
from typing import Any

import datasets

from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.encoding.messages import read_id, value_kind
from lit_alignment.data.encoding.rows import ROW_FEATURES
from lit_alignment.data.encoding.tokenizer import num_tokens
from lit_alignment.data.passages import Passage, read_passage
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError

STRING = datasets.Value("string")
PASSAGE_ROW = datasets.Features({**ROW_FEATURES, "title": STRING, "text": STRING})
QUESTION_ROW = datasets.Features(
    {**ROW_FEATURES, "query": STRING, "passages": STRING, "weight": datasets.Value("float64")}
)


@dataclass
class PassageItem:
    """One passage to encode.

    Args:
        index: Position among all, its row in the index.
        title: What it is about; may be empty.
        text: The text.
    """

    index: int
    title: str
    text: str


@dataclass
class PassageBatch:
    """Passages to encode together."""

    items: list[PassageItem]


@dataclass
class QuestionRecord:
    """A question with a passage that answers it, and others that only look like it.

    Args:
        id: Its own id, or its position in the file.
        query: The question.
        positive: Title and text of the passage that answers it.
        negatives: Titles and texts of hard negatives.
        where: File and line, for error messages.
    """

    id: str
    query: str
    positive: list[str]
    negatives: list[list[str]]
    where: str


@dataclass
class QuestionBatch:
    """Questions, each with its own passage, and further passages that are nobody's own.

    Args:
        queries: B questions.
        passages: Titles and texts, N of them: the questions' own in their order, then the hard negatives.
        weights: Weight of each question; 0 for one that only keeps its rank in step.
        window_weight: Questions of the whole optimizer step.
        ids: Where each came from.
    """

    queries: list[str]
    passages: list[tuple[str, str]]
    weights: list[float]
    window_weight: float
    ids: list[str]


class PassageDataModule(AlignmentDataModule):
    """Passages `{id?, title?, text}` for `predict`, which encodes them.

    Settings are those of AlignmentDataModule.
    """

    def read(self, raw: object, where: str, position: int) -> Passage:
        """One passage."""
        return read_passage(raw, where, position)

    @property
    def features(self) -> datasets.Features:
        """Columns of a passage."""
        return PASSAGE_ROW

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a passage."""
        return PASSAGE_ROW

    def encode_record(self, record: Passage, source: SourceConfig) -> dict[str, Any]:
        """Refuse to train on passages alone."""
        raise ConfigError("PassageDataModule has nothing to train on; use RetrieverDataModule or RAGDataModule.")

    def predict_row(self, record: Passage, source: SourceConfig) -> dict[str, Any]:
        """Title and text, and their number of tokens before any is cut off."""
        length = num_tokens(self.tokenizer, [record.title, record.text])
        return {"length": length, "title": record.title, "text": record.text}

    def predict_item(self, row: dict[str, Any], index: int) -> PassageItem:
        """One passage."""
        return PassageItem(index, row["title"], row["text"])

    def predict_collate(self, items: list[Any]) -> Any:
        """Passages of similar length."""
        return PassageBatch(items)

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> Any:
        """There is no training batch."""
        raise NotImplementedError


class RetrieverDataModule(AlignmentDataModule):
    """Questions `{id?, query, positive, negatives?}`, where passages are texts or `{title?, text}`.

    Settings are those of AlignmentDataModule; each of the `batch_size` questions of a batch has the passages of all
    others as negatives besides its own hard ones, so the batch size is a part of the loss, and `packing` plays none.
    """

    def check_settings(self) -> None:
        """Questions are never packed into rows."""
        self.packing = False
        super().check_settings()

    def read(self, raw: object, where: str, position: int) -> QuestionRecord:
        """One question."""
        if not isinstance(raw, dict):
            raise RecordError(where, "", f"the record is {value_kind(raw)}", 'Write {"query", "positive"}.')
        query = raw.get("query")
        if not isinstance(query, str) or not query.strip():
            problem = "is missing" if query is None else "is empty" if query == "" else f"is {value_kind(query)}"
            raise RecordError(where, "query", problem, "Give the question as a string.")
        if raw.get("positive") is None:
            raise RecordError(where, "positive", "is missing", "Give the passage that answers the question.")
        negatives = raw.get("negatives") or []
        if not isinstance(negatives, list):
            raise RecordError(where, "negatives", f"is {value_kind(negatives)}", "Make it a list of passages.")
        positive, *others = (read_passage(each, where, 0) for each in (raw["positive"], *negatives))
        return QuestionRecord(
            id=read_id(raw.get("id"), "id", where, position),
            query=query,
            positive=[positive.title, positive.text],
            negatives=[[other.title, other.text] for other in others],
            where=where,
        )

    @property
    def features(self) -> datasets.Features:
        """Columns of a question."""
        return QUESTION_ROW

    def encode_record(self, record: QuestionRecord, source: SourceConfig) -> dict[str, Any]:
        """The question and its passages, and the number of all their tokens before any is cut off."""
        passages = [record.positive, *record.negatives]
        length = num_tokens(self.tokenizer, [record.query, *(text for passage in passages for text in passage)])
        return {"length": length, "query": record.query, "passages": json.dumps(passages), "weight": 1.0}

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> QuestionBatch:
        """Questions and passages as texts, of which the module makes tokens."""
        passages = [[tuple(each) for each in json.loads(row["passages"])] for row in rows]
        return QuestionBatch(
            queries=[row["query"] for row in rows],
            passages=[own[0] for own in passages] + [other for own in passages for other in own[1:]],
            weights=[0.0 if planned.dummy else 1.0] * len(rows),
            window_weight=planned.window_weight,
            ids=[f"{row['dataset']}/{row['id']}" for row in rows],
        )
