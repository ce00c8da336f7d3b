"""Passages to encode, and questions with their passages for the warm-up of a retriever."""

import json
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.messages import Record, value_kind
from lit_alignment.data.encoding.prompts import ROW_FEATURES, Item
from lit_alignment.data.passages import Passage, read_passage
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError

STRING = datasets.Value("string")
PASSAGE_ROW = datasets.Features({**ROW_FEATURES, "title": STRING, "text": STRING})
QUESTION_ROW = datasets.Features(
    {**ROW_FEATURES, "query": STRING, "passages": STRING, "weight": datasets.Value("float64")}
)


class NoTemplate(Encoder):
    """What stands for the encoder of conversations where there are none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, seed: int = 0) -> None:
        """Keep the settings; there is no chat template."""
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.template: Any = None


@dataclass(kw_only=True)
class PassageItem(Item):
    """One passage to encode."""

    title: str
    text: str


@dataclass
class PassageBatch:
    """Passages to encode together."""

    items: list[PassageItem]


@dataclass
class QuestionRecord(Record):
    """A question with a passage that answers it, and others that only look like it.

    Args:
        query: The question.
        positive: Title and text of the passage that answers it.
        negatives: Titles and texts of hard negatives.
    """

    query: str = ""
    positive: list[str] = field(default_factory=list)
    negatives: list[list[str]] = field(default_factory=list)


@dataclass
class QuestionBatch:
    """Questions, each with its own passage, and further passages that are nobody's own.

    Args:
        queries: B questions.
        passages: Titles and texts, N of them: the questions' own in their order, then the hard negatives.
        weights: Weight of each question; 0 for one that only keeps its rank in step.
        window_weight: Questions of the whole optimiser step.
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

    record_type = Passage
    encoder_type = NoTemplate

    def read(self, raw: object, where: str, position: int) -> Record:
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

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Refuse to train on passages alone."""
        raise ConfigError("PassageDataModule has nothing to train on; use RetrieverDataModule or RAGDataModule.")

    def predict_row(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Title and text."""
        if not isinstance(record, Passage):
            raise TypeError(f"{type(record).__name__} is no passage.")
        return {"length": len(record.title) + len(record.text), "title": record.title, "text": record.text}

    def predict_item(self, row: dict[str, Any], index: int) -> PassageItem:
        """One passage."""
        rest = {name: row[name] for name in ("id", "dataset", "title", "text")}
        return PassageItem(index=index, messages=[], label=None, meta=None, **rest)

    def predict_collate(self, items: list[Any]) -> Any:
        """Passages of similar length."""
        return PassageBatch(items)

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> Any:
        """There is no training batch."""
        raise NotImplementedError


class RetrieverDataModule(AlignmentDataModule):
    """Questions `{id?, query, positive, negatives?}`, where passages are texts or `{title?, text}`.

    Settings are those of AlignmentDataModule; each of the `batch_size` questions of a batch has the passages of all
    others as negatives besides its own hard ones, so the batch size is a part of the loss.
    """

    record_type = QuestionRecord
    encoder_type = NoTemplate

    def read(self, raw: object, where: str, position: int) -> Record:
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
            str(raw.get("id", position)),
            [],
            where,
            query=query,
            positive=[positive.title, positive.text],
            negatives=[[other.title, other.text] for other in others],
        )

    @property
    def features(self) -> datasets.Features:
        """Columns of a question."""
        return QUESTION_ROW

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """The question and its passages."""
        if not isinstance(record, QuestionRecord):
            raise TypeError(f"{type(record).__name__} is no question.")
        passages = json.dumps([record.positive, *record.negatives])
        return {"length": len(record.query), "query": record.query, "passages": passages, "weight": 1.0}

    def plan(self, split: Any) -> BatchPlan:
        """Batches of questions, never packed rows."""
        self.packing = False
        return super().plan(split)

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> QuestionBatch:
        """Questions and passages as texts; the module's tokenizer makes tokens of them."""
        passages = [[tuple(each) for each in json.loads(row["passages"])] for row in rows]
        return QuestionBatch(
            queries=[row["query"] for row in rows],
            passages=[own[0] for own in passages] + [other for own in passages for other in own[1:]],
            weights=[0.0 if planned.filler else 1.0] * len(rows),
            window_weight=planned.window_weight,
            ids=[f"{row['dataset']}/{row['id']}" for row in rows],
        )
