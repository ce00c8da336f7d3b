"""Prompts: what a model is asked in predict and in cherry picks."""

import json
from dataclasses import dataclass
from typing import Any

import datasets

from lit_alignment.data.encode import Dropped, Encoder
from lit_alignment.data.messages import Message, Record
from lit_alignment.data.records import Source

ROW_FEATURES = {
    "id": datasets.Value("string"),
    "dataset": datasets.Value("string"),
    "dropped": datasets.Value("string"),
    "detail": datasets.Value("string"),
    "length": datasets.Value("int64"),
}
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


@dataclass
class PromptItem:
    """One prompt with what its record said.

    Args:
        index: Position among all prompts, the order of the predictions.
        id: The record's id.
        dataset: Name of its source.
        input_ids: Token ids to generate from.
        messages: The messages behind them.
        reference: The response that the record has here, if any.
        label: The record's label.
        meta: The record's meta.
    """

    index: int
    id: str
    dataset: str
    input_ids: list[int]
    messages: list[Message]
    reference: str | None
    label: Any
    meta: Any


@dataclass
class PromptBatch:
    """Prompts to answer together."""

    items: list[PromptItem]


def prompt_row(encoder: Encoder, record: Record, source: Source) -> dict[str, Any]:
    """The columns of PROMPT_FEATURES; a dropped record carries its reason."""
    row: dict[str, Any] = {
        "id": record.id,
        "dataset": source.title,
        "dropped": "",
        "detail": "",
        "input_ids": [],
        "messages": "[]",
        "reference": None,
        "label": json.dumps(record.label),
        "meta": json.dumps(record.meta),
    }
    try:
        prompt = encoder.encode_prompt(record, source.system_prompt)
    except Dropped as drop:
        return {**row, "length": 0, "dropped": drop.reason, "detail": drop.detail}
    return {
        **row,
        "length": len(prompt.input_ids),
        "input_ids": prompt.input_ids,
        "messages": json.dumps(prompt.messages),
        "reference": prompt.reference,
    }


def prompt_item(row: dict[str, Any], index: int) -> PromptItem:
    """One row of PROMPT_FEATURES as an item; `index` is its place among all prompts."""
    loaded = {name: json.loads(row[name]) for name in ("messages", "label", "meta")}
    rest = {name: row[name] for name in ("id", "dataset", "input_ids", "reference")}
    return PromptItem(index=index, **rest, **loaded)
