"""Data modules whose records are conversations: one encoder for training and for prompts."""

import copy
import sys
from dataclasses import asdict, replace
from typing import Any, Self

import datasets
from lightning.pytorch import Trainer

from lit_alignment.data.base import AlignmentDataModule, datamodule_of
from lit_alignment.data.batching.items import ItemBatch, PromptBatch
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Record, read_record
from lit_alignment.data.encoding.prompts import PROMPT_FEATURES, Item, prompt_item, prompt_row
from lit_alignment.data.encoding.templates import JinjaTemplate, PrefixSuffixTemplate, TemplateConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.files import config_from


class ConversationDataModule(AlignmentDataModule):
    """Conversations, their encoder, and the prompts that predict and cherry picks make of them.

    Settings are those of AlignmentDataModule.
    """

    encoder_type: type[Encoder] = Encoder
    encoder: Encoder

    def check_settings(self) -> None:
        """Also build the encoder, which refuses a tokenizer without a chat template."""
        super().check_settings()
        self.encoder = self.encoder_type(self.tokenizer, self.encoding, self.seed)

    def read(self, raw: object, where: str, position: int) -> Record:
        """One conversation."""
        return read_record(raw, where, position)

    def read_prompt(self, raw: object, where: str, position: int) -> Record:
        """One conversation, or a prompt without an answer."""
        return self.read(
            {"completion": [], **raw} if isinstance(raw, dict) and "prompt" in raw else raw, where, position
        )

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a prompt."""
        return PROMPT_FEATURES

    def predict_row(self, record: Any, source: SourceConfig) -> dict[str, Any]:
        """The prompt of a conversation."""
        return prompt_row(self.encoder, record, source)

    def predict_item(self, row: dict[str, Any], index: int) -> Item:
        """One prompt."""
        return prompt_item(row, index)

    def predict_collate(self, items: list[Any]) -> PromptBatch | ItemBatch:
        """Prompts to answer together."""
        return PromptBatch(items)

    def remarks(self) -> list[str]:
        """What the encoder says about its template."""
        return [*self.encoder.locator.remarks(), *self.encoder.template.remarks()]

    def decides_encoding(self) -> list[Any]:
        """Also settings and template of the encoder."""
        return [*super().decides_encoding(), asdict(self.encoder.config), self.chat_template()]

    def views(self, row: dict[str, Any]) -> list[tuple[str, Example]]:
        """The one sequence of a row."""
        ids = row["input_ids"]
        labels = row.get("labels", [IGNORE_INDEX] * len(ids))
        return [("", Example(ids, labels, row.get("weights", [0.0] * len(ids))))]

    def chat_template(self) -> str | dict[str, str] | None:
        """What conversations are rendered with, as Jinja templates to be saved with the model."""
        match self.encoder.template:
            case JinjaTemplate(sources=sources):
                return sources if len(sources) > 1 else sources["default"]
            case PrefixSuffixTemplate() as template:
                return template.as_jinja()
            case _:
                return None

    def whole(self) -> Self:
        """A copy without packing that shortens no conversation, for what a loaded model is asked."""
        own = copy.copy(self)
        own.packing, own.encoder = False, copy.copy(self.encoder)
        own.encoder.config = replace(self.encoder.config, max_length=sys.maxsize)
        return own

    def asking_settings(self) -> dict[str, Any]:
        """How conversations are encoded; the template's text is kept apart (`chat_template`)."""
        config = self.encoder.config
        template = replace(config.template, file=None, date=None)
        return {**super().asking_settings(), "encoding": asdict(replace(config, template=template))}

    @classmethod
    def read_asking_settings(cls, values: dict[str, Any], where: object) -> dict[str, Any]:
        """The encoding; a checkpoint names no file of a template, and no limit of what it may write."""
        found = super().read_asking_settings(values, where)
        if (encoding := values.get("encoding")) is None:
            return found
        kept = {"file": None, "date": None, "max_characters": TemplateConfig.max_characters}
        template = config_from(TemplateConfig, dict(encoding.get("template", {})) | kept, where)
        return {**found, "encoding": config_from(EncodingConfig, encoding | {"template": template}, where)}


def conversations_of(trainer: Trainer) -> ConversationDataModule:
    """The data module that a trainer runs on, where that has conversations and their encoder.

    Raises:
        ConfigError: If it has none.
    """
    data = datamodule_of(trainer)
    if not isinstance(data, ConversationDataModule):
        raise ConfigError(f"a data module of conversations is needed here, not {type(data).__name__}.")
    return data
