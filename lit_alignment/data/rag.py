"""Conversations whose last response is given with the help of passages."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, get_args

import datasets
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.packing import BatchPlan, PlannedBatch
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.example import Dropped, Example, Prompt
from lit_alignment.data.encoding.messages import TEMPLATE_KEYS, Message, Record, read_id, read_record, value_kind
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.encoding.rows import ROW_FEATURES
from lit_alignment.data.encoding.spans import dropped
from lit_alignment.data.encoding.templates import JinjaTemplate
from lit_alignment.data.passages import Passage, check_format, format_passage
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError, TemplateError
from lit_alignment.files import config_from
from lit_alignment.moved import renamed

Query = Literal["last_user", "dialogue"]
STRING = datasets.Value("string")


@dataclass(frozen=True)
class PassagePlacementConfig:
    """How passages stand in a conversation.

    Args:
        place: Around the last user message (`user`), in the system message (`system`), or handed to a chat template
            that takes them (`documents`).
        block: How the passages stand beside the message that takes them, a text with {passages} and {message}. With
            the passages last, all sequences of a question begin alike, and that beginning is computed once.
        passage: How one passage is written, a text with {title} and {text}.
        separator: Between passages.
        max_tokens: Longest passage, in the generator's tokens; longer ones lose their end. So do passages for which
            `encoding.max_length` leaves no room.
    """

    place: Literal["user", "system", "documents"] = "user"
    block: str = "{passages}\n\n{message}"
    passage: str = "{title}\n{text}"
    separator: str = "\n\n"
    max_tokens: int = 256

    def __post_init__(self) -> None:
        """Refuse forms that lose something."""
        check_format("placement.passage", self.passage)
        if self.block.count("{passages}") != 1 or self.block.count("{message}") != 1:
            raise ConfigError(f"placement.block is {self.block!r}; give {{passages}} and {{message}} once each.")
        if self.max_tokens < 1:
            raise ConfigError(f"placement.max_tokens is {self.max_tokens}; use 1 or more.")


class RAGEncoder(Encoder):
    """Encodes conversations with passages in them, so that the last response is trained or asked for.

    Args:
        tokenizer: The generator's tokenizer.
        config: How conversations become examples; the last response alone is trained.
        seed: Seed of random cuts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, seed: int = 0) -> None:
        """Take the settings that RAG needs.

        Raises:
            ConfigError: If messages would be cut inside.
        """
        if config.truncation_unit != "messages":
            raise ConfigError("encoding.truncation_unit: RAG removes whole messages and cuts passages; use messages.")
        super().__init__(tokenizer, replace(config, loss_on="last_assistant"), seed)
        self.placement = PassagePlacementConfig()

    def without_end(self) -> "RAGEncoder":
        """The same for answers that a limit has cut: what would end their turn is not scored."""
        own = copy.copy(self)
        own.config = replace(self.config, end_of_turn="none")
        return own

    def split(self, record: Record, system_prompt: str | None = None) -> tuple[list[Message], Message]:
        """The messages up to the last response, shortened to `max_length` without passages, and that response.

        Nothing of what earlier messages say of the loss is kept: they are not trained.

        Raises:
            Dropped: If there is no response to train on, no question before it, or it is too long.
        """
        messages = self._prepared(record, system_prompt)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        if last < 0 or not messages[last].get("train", True) or messages[last].get("weight", 1.0) <= 0:
            raise Dropped("no_trained_message")
        answer = messages[last]
        asked: list[Message] = [untrained(message) for message in messages[:last]]
        if not any(message["role"] == "user" for message in asked):
            raise Dropped("no_question")
        try:
            _, kept = self._shorten_ids(
                record,
                [*asked, answer],
                lambda shorter: self._encode_messages(shorter, record.tools).input_ids,
                lambda message: message is answer,
            )
        except TemplateError as error:
            raise dropped(record, error, self.locator) from error
        if not any(message["role"] == "user" for message in kept):
            raise Dropped("too_long")
        return kept[:-1], answer

    def example(
        self, asked: list[Message], answer: Message, passages: Sequence[Passage], tools: Sequence[Any] = ()
    ) -> Example:
        """A training example with passages in the prompt.

        Args:
            asked: The messages up to the answer.
            answer: The trained message.
            passages: What was retrieved, best first; may be empty.
            tools: Tool descriptions for the template.
        """
        found: Example = self._fitted(
            asked, passages, lambda placed, own: own._encode_messages([*placed, answer], list(tools))
        )
        return found

    def prompt(self, asked: list[Message], passages: Sequence[Passage], tools: Sequence[Any] = ()) -> Prompt:
        """What to generate from, with passages in it."""
        found: Prompt = self._fitted(
            asked,
            passages,
            lambda placed, own: Prompt(
                own._prompt_ids(Record("", placed, "", tools=list(tools)), placed), placed, None
            ),
        )
        return found

    def _fitted(self, asked: list[Message], passages: Sequence[Passage], encode: Any) -> Any:
        """What `encode` makes of the messages with the passages, these cut until all fits into `max_length`."""
        limit = self.placement.max_tokens
        while True:
            encoded = encode(*self._placed(asked, passages, limit))
            excess = len(encoded.input_ids) - self.config.max_length
            if excess <= 0 or not passages or limit == 0:
                return encoded
            # Only passages that reach the limit become shorter, so one round may not do.
            limit = max(0, min(limit - 1, limit - -(-excess // len(passages))))

    def _placed(
        self, asked: list[Message], passages: Sequence[Passage], limit: int
    ) -> tuple[list[Message], "RAGEncoder"]:
        """Messages with the passages in them, and the encoder whose template knows of the others."""
        if not passages:
            return asked, self
        placement = self.placement
        texts = [(passage.title, self._cut(passage.text, limit)) for passage in passages]
        if placement.place == "documents":
            template = copy.copy(self.template)
            if not isinstance(template, JinjaTemplate):
                raise ConfigError("placement.place: documents needs a Jinja chat template; use user or system.")
            documents = [{"title": title, "text": text} for title, text in texts]
            template.variables = {**template.variables, "documents": documents}
            own = copy.copy(self)
            own.template, own.locator = template, copy.copy(self.locator)
            own.locator.template = template
            return asked, own
        written = placement.separator.join(format_passage(placement.passage, *each) for each in texts)
        messages = list(asked)
        if placement.place == "system" and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": "", "train": False})
        index = 0
        if placement.place == "user":
            index = max(i for i, message in enumerate(messages) if message["role"] == "user")
        # Not str.format: a message may hold braces.
        before, _, after = placement.block.partition("{passages}")
        content = messages[index]["content"]
        filled = before.replace("{message}", content) + written + after.replace("{message}", content)
        messages[index] = {**messages[index], "content": filled.strip() if not content else filled}
        return messages, self

    def _cut(self, text: str, limit: int) -> str:
        """The text up to its first tokens."""
        if len(text) <= limit:  # a token has at least one character
            return text
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= limit else text[: offsets[limit - 1][1]] if limit else ""


def untrained(message: Message) -> Message:
    """A message without what it says of the loss."""
    return {key: message[key] for key in TEMPLATE_KEYS if key in message} | {"train": False}


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
        placement: PassagePlacementConfig = PassagePlacementConfig(),
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
