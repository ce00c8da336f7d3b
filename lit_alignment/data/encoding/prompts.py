"""Prompts: what a model is asked in predict and in cherry picks."""

import json
from dataclasses import dataclass
from typing import Any

import datasets

from lit_alignment.data.encoding.encoder import Encoder
from lit_alignment.data.encoding.example import Prompt
from lit_alignment.data.encoding.messages import Message, Record
from lit_alignment.data.encoding.rows import ROW_FEATURES
from lit_alignment.data.sources.records import SourceConfig

PROMPT_FEATURES = datasets.Features(
    {
        **ROW_FEATURES,
        "input_ids": datasets.List(datasets.Value("int32")),
        "messages": datasets.Value("string"),
        "reference": datasets.Value("string"),
        "label": datasets.Value("string"),
        "meta": datasets.Value("string"),
    }
)


@dataclass(kw_only=True)
class Item:
    """What one record asks in predict.

    Args:
        index: Position among all, the order of the predictions.
        id: The record's id.
        dataset: Name of its source.
        messages: The messages that the model sees.
        label: The record's label.
        meta: The record's meta.
        reference: The response that the record has here, if any.
    """

    index: int
    id: str
    dataset: str
    messages: list[Message]
    label: Any
    meta: Any
    reference: str | None = None


@dataclass(kw_only=True)
class PromptItem(Item):
    """One prompt to answer, or conversation to classify.

    Args:
        input_ids: Token ids.
    """

    input_ids: list[int]


def prompt_row(encoder: Encoder, record: Record, source: SourceConfig) -> dict[str, Any]:
    """The columns of PROMPT_FEATURES of a record's prompt.

    Raises:
        Dropped: If it has none.
    """
    return prompt_columns(record, encoder.encode_prompt(record, source.system_prompt))


def prompt_columns(record: Record, prompt: Prompt) -> dict[str, Any]:
    """The columns of PROMPT_FEATURES of any ids to give to a model."""
    return {
        "length": len(prompt.input_ids),
        "input_ids": prompt.input_ids,
        "messages": json.dumps(prompt.messages),
        "reference": prompt.reference,
        "label": json.dumps(record.label),
        "meta": json.dumps(record.meta),
    }


def prompt_item(row: dict[str, Any], index: int) -> PromptItem:
    """One row of PROMPT_FEATURES as an item; `index` is its position among all prompts."""
    loaded = {name: json.loads(row[name]) for name in ("messages", "label", "meta")}
    rest = {name: row[name] for name in ("id", "dataset", "input_ids", "reference")}
    return PromptItem(index=index, **rest, **loaded)
