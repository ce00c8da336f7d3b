"""Conversations whose last response is given with the help of passages."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

import datasets
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.example import Dropped, Example
from lit_alignment.data.encoding.messages import Message, Record, read_id, read_record, value_kind
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.encoding.rows import ROW_FEATURES
from lit_alignment.data.passage_encoder import PassagePlacementConfig, RAGEncoder
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import RecordError
from lit_alignment.files import config_from
from lit_alignment.moved import renamed

Query = Literal["last_user", "dialogue"]
STRING = datasets.Value("string")


def query_text(asked: Sequence[Message], query: Query) -> str:
    """What the retriever is asked, from the messages before the answer alone.

    Args:
        asked: The messages up to the answer, without passages.
        query: The last user message, or all messages but the system's.
    """
    if query == "last_user":
        return str(next(m["content"] for m in reversed(asked) if m["role"] == "user"))
    return "\n".join(str(m["content"]) for m in asked if m["role"] != "system")


@dataclass
class RAGRecord(Record):
    """A conversation, with the passages that are known to help.

    Args:
        relevant: Their ids.
    """

    relevant: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class RAGItem(Item):
    """One question: the messages up to the answer, and what is asked of the retriever.

    Args:
        query: Text for the retriever.
        answer: The trained message, or None in predict.
        tools: Tool descriptions.
        relevant: Ids of passages that are known to help.
    """

    query: str
    answer: Message | None
    tools: list[Any]
    relevant: list[str]


@dataclass
class RAGBatch:
    """Questions of one micro-batch, or of predict.

    Args:
        items: The questions.
        weights: Weight of each; 0 for one that only keeps its rank in step.
        window_weight: Trained weight of all tokens of the optimizer step.
        window_examples: Questions of the optimizer step.
        window_share: Its questions' tokens as a share of the optimizer step's.
    """

    items: list[RAGItem]
    weights: list[float] = field(default_factory=list)
    window_weight: float = 0.0
    window_examples: int = 0
    window_share: float = 0.0

    @property
    def ids(self) -> list[str]:
        """Where each question came from."""
        return [f"{item.dataset}/{item.id}" for item in self.items]


QUESTION = {"query": STRING, "messages": STRING, "tools": STRING, "relevant": datasets.List(STRING)}


class RAGDataModule(ConversationDataModule):
    """Chat records whose last response is trained, as questions for a retriever and a generator.

    Records are those of SFTDataModule, with `relevant: [passage ids]` where these are known (for recall). A batch has
    `batch_size` questions; with `packing`, all their sequences stand in one row without padding.

    Args:
        tokenizer: The generator's tokenizer.
        query: What the retriever is asked: the last user message, or the dialogue up to the answer. The answer itself
            never is a part of it.
        placement: How passages stand in the conversation.
        **settings: As of AlignmentDataModule.
    """

    whole_prompts = False  # passages come later
    encoder_type = RAGEncoder
    encoder: RAGEncoder

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: Query = "last_user",
        placement: PassagePlacementConfig = PassagePlacementConfig(),  # noqa: B008 - frozen
        **settings: Any,
    ) -> None:
        """Check the settings."""
        super().__init__(tokenizer, **settings)
        self.query = query
        self.encoder.placement = placement
        self.share_prompts = self.packing

    def read(self, raw: object, where: str, position: int) -> RAGRecord:
        """One conversation."""
        record = read_record(raw, where, position)
        relevant = raw.get("relevant") if isinstance(raw, dict) else None
        if not isinstance(relevant, list | None):
            raise RecordError(where, "relevant", f"is {value_kind(relevant)}", "Give a list of passage ids.")
        ids = [read_id(each, f"relevant[{index}]", where, index) for index, each in enumerate(relevant or [])]
        return RAGRecord(**vars(record), relevant=ids)

    @property
    def features(self) -> datasets.Features:
        """Columns of a question with its answer."""
        number, whole = datasets.Value("float64"), datasets.Value("int64")
        return datasets.Features({**ROW_FEATURES, **QUESTION, "answer": STRING, "weight": number, "num_trained": whole})

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a question."""
        rest = {name: STRING for name in ("reference", "label", "meta")}
        return datasets.Features({**ROW_FEATURES, **QUESTION, **rest})

    def whole(self) -> Self:
        """Itself: passages are cut so that they fit into what training has seen."""
        return self

    def asking_settings(self) -> dict[str, Any]:
        """Also what makes the query, and where passages stand."""
        return {**super().asking_settings(), "query": self.query, "placement": asdict(self.encoder.placement)}

    @classmethod
    def read_asking_settings(cls, values: dict[str, Any], where: object) -> dict[str, Any]:
        """The same."""
        found = super().read_asking_settings(values, where)
        if values.get("query") in get_args(Query):
            found["query"] = values["query"]
        if "placement" in values:
            found["placement"] = config_from(PassagePlacementConfig, values["placement"], where)
        return found

    def decides_encoding(self) -> list[Any]:
        """Also what makes the query, and where passages stand."""
        return [*super().decides_encoding(), self.query, asdict(self.encoder.placement)]

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """The question, and its answer with the number of its tokens, which no passage changes."""
        asked, answer = self.encoder.split(record, source.system_prompt)
        example = self.encoder.example(asked, answer, [], record.tools)
        if example.num_trained == 0:
            raise Dropped("no_trained_token")
        return {
            **self._question(record, asked),
            "length": len(example.input_ids),
            "answer": json.dumps(answer),
            "weight": sum(example.weights[1:]),
            "num_trained": example.num_trained,
        }

    def predict_row(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """The question."""
        prompt = self.encoder.encode_prompt(record, source.system_prompt)
        if not any(message["role"] == "user" for message in prompt.messages):
            raise Dropped("no_question")
        return {
            **self._question(record, prompt.messages),
            "length": len(prompt.input_ids),
            "reference": prompt.reference,
            "label": json.dumps(record.label),
            "meta": json.dumps(record.meta),
        }

    def _question(self, record: Record, asked: list[Message]) -> dict[str, Any]:
        return {
            "query": query_text(asked, self.query),
            "messages": json.dumps(asked),
            "tools": json.dumps(record.tools),
            "relevant": record.relevant if isinstance(record, RAGRecord) else [],
        }

    def predict_item(self, row: dict[str, Any], index: int) -> RAGItem:
        """One question."""
        return RAGItem(
            index=index,
            id=row["id"],
            dataset=row["dataset"],
            messages=json.loads(row["messages"]),
            label=json.loads(row.get("label") or "null"),
            meta=json.loads(row.get("meta") or "null"),
            query=row["query"],
            answer=json.loads(row.get("answer") or "null"),
            reference=row.get("reference"),
            tools=json.loads(row["tools"]),
            relevant=row["relevant"],
        )

    def predict_collate(self, items: list[Any]) -> Any:
        """Questions to answer together."""
        return RAGBatch(items)

    def plan(self, split: Any) -> BatchPlan:
        """Batches of questions: how many tokens they have depends on what is retrieved."""
        return replace(super().plan(split), tokens_per_batch=None)

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> RAGBatch:
        """Questions with their answers; passages and tokens come when the retriever has been asked."""
        return RAGBatch(
            [self.predict_item(row, index) for row, index in zip(rows, planned.indices, strict=True)],
            weights=[0.0 if planned.dummy else 1.0] * len(rows),
            window_weight=planned.window_weight,
            window_examples=planned.window_examples,
            window_share=planned.share,
        )

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """The conversation without passages, for people to look at."""
        item = self.predict_item(row, 0)
        if item.answer is None:
            return []
        return [(f"query: {item.query}", self.encoder.example(item.messages, item.answer, [], item.tools))]


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
