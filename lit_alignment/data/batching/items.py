"""What predict works on: items, with their tokens where these are read together."""

from dataclasses import dataclass
from typing import Any

from lit_alignment.data.batching.collate import ScoreBatch
from lit_alignment.data.encoding.prompts import PromptItem


@dataclass
class PromptBatch:
    """Prompts to answer together."""

    items: list[PromptItem]


@dataclass
class ItemBatch:
    """What is scored together: the items, and their tokens."""

    items: list[Any]
    scores: ScoreBatch
