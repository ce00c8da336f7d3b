"""Conversations with images, or sounds, in them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.example import Dropped, Example, Prompt
from lit_alignment.data.encoding.messages import IGNORE_INDEX, Message, Record, read_record
from lit_alignment.data.encoding.prompts import PROMPT_FEATURES, PromptItem, prompt_columns, prompt_item
from lit_alignment.data.multimodal.media import (
    PLURALS,
    MediaTokens,
    UnreadableMediaError,
    files_of,
    read_media_messages,
)
from lit_alignment.data.sft import SFTDataModule
from lit_alignment.data.sources.cache import fingerprint
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError, TemplateError

MEDIA = {"media": datasets.Value("string")}  # files by modality, as JSON


class VLMEncoder(Encoder):
    """Encodes conversations in which placeholders stand for images and sounds.

    Too long ones lose whole messages, so that no image is cut.

    Args:
        tokenizer: The language model's tokenizer, with the placeholders.
        config: How conversations become examples.
        seed: Seed of random cuts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, seed: int = 0) -> None:
        """Refuse what would cut an image.

        Raises:
            ConfigError: If single tokens would be removed.
        """
        if config.truncation_unit != "messages":
            raise ConfigError("encoding.truncation_unit: tokens would cut images; use messages.")
        super().__init__(tokenizer, config, seed)
        self.media: dict[str, MediaTokens] = {}

    @property
    def placeholders(self) -> set[str]:
        """The tokens of files."""
        return {media.token for media in self.media.values()}

    def encode(self, record: Record, system_prompt: str | None = None) -> Example:
        """The training example of a record, with the files that its placeholders stand for."""
        try:
            return super().encode(record, system_prompt)
        except Dropped as drop:
            raise self._explained(drop, record) from drop

    def encode_prompt(self, record: Record, system_prompt: str | None = None) -> Prompt:
        """The ids to generate from, with the files that their placeholders stand for."""
        try:
            prompt = super().encode_prompt(record, system_prompt)
        except Dropped as drop:
            raise self._explained(drop, record) from drop
        prompt.media = self._files(prompt.messages)
        return prompt

    def _explained(self, drop: Dropped, record: Record) -> Dropped:
        """The same, with what the images need, if that may be why a conversation is too long."""
        needed = {name: len(files) * self.media[name].number for name, files in self._files(record.messages).items()}
        if drop.reason != "too_long" or not any(needed.values()):
            return drop
        parts = " and ".join(f"its {PLURALS[name]} take {number} tokens" for name, number in needed.items() if number)
        detail = (
            f"{record.where}: {parts}, and encoding.max_length is {self.config.max_length}. Raise it, or choose a "
            "projector that makes fewer embeddings."
        )
        return Dropped(drop.reason, detail)

    def _encode_messages(self, messages: list[Message], tools: list[Any]) -> Example:
        example = super()._encode_messages(self._expanded(messages), tools)
        example.media = self._files(messages)
        self._check(example.input_ids, example.media)
        placeholders = {media.token_id for media in self.media.values()}
        for position, index in enumerate(example.input_ids):
            if index in placeholders:  # nothing is to be learned from predicting them
                example.labels[position], example.weights[position] = IGNORE_INDEX, 0.0
        return example

    def _prompt_ids(self, record: Record, messages: list[Message]) -> list[int]:
        ids = super()._prompt_ids(record, self._expanded(messages))
        self._check(ids, self._files(messages))
        return ids

    def _expanded(self, messages: list[Message]) -> list[Message]:
        """Messages with as many placeholders as the language model gets embeddings."""
        found = []
        for message in messages:
            content = message["content"]
            for media in self.media.values():
                content = content and content.replace(media.token, media.expanded())
            found.append({**message, "content": content})
        return found

    def _files(self, messages: Sequence[Message]) -> dict[str, list[str]]:
        return {name: files_of(messages, name) for name in self.media}

    def _check(self, ids: Sequence[int], files: dict[str, list[str]]) -> None:
        """Refuse ids whose placeholders are not those of the files.

        Raises:
            TemplateError: Naming the files, and what to change.
        """
        for name, media in self.media.items():
            expected, found = media.number * len(files[name]), list(ids).count(media.token_id)
            if found != expected:
                raise TemplateError(
                    f"{len(files[name])} {PLURALS[name]} ({', '.join(files[name][:3])}) need {expected} placeholders "
                    f"{media.token}, and {found} are there: the chat template loses or doubles them, or the tokenizer "
                    f"splits them. Change data's encoding.template, or model.{name}.token"
                )


@dataclass(kw_only=True)
class MediaBatch(TargetBatch):
    """A batch of tokens, and what its placeholders stand for.

    Args:
        media: By modality, what the reader gave for all files in order: inputs of each encoder, or features.
        placeholders: By modality, positions of its placeholders, row * T + position.
    """

    media: dict[str, list[Tensor]] = field(default_factory=dict)
    placeholders: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class MediaItem(PromptItem):
    """A prompt, and the files that its placeholders stand for.

    Args:
        media: Files by modality.
    """

    media: dict[str, list[str]]


class VLMDataModule(SFTDataModule):
    """Chat records with images, or sounds, for supervised fine-tuning.

    Records are those of SFTDataModule, in which files stand as a message (`{role, type: image, content: path}`), as a
    part of OpenAI's lists, or as `images` beside placeholders in the texts. A record without files is an ordinary one.

    Args:
        tokenizer: The language model's tokenizer.
        media: Placeholder and reader by modality; given by the module.
        folder: Where relative paths of files begin; by default where the file of records is.
        **settings: As of AlignmentDataModule.
    """

    encoder_type = VLMEncoder
    encoder: VLMEncoder

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, media: Any = None, folder: str | None = None, **settings: Any
    ) -> None:
        """Check the settings."""
        super().__init__(tokenizer, **settings)
        if not media:
            raise ConfigError("VLMDataModule needs the placeholders of a VLMModule: set model to one.")
        self.media: dict[str, MediaTokens] = media
        self.encoder.media = self.media
        self.folder = None if folder is None else Path(folder).expanduser()

    def read(self, raw: object, where: str, position: int) -> Record:
        """One conversation with its files."""
        tokens = {name: media.token for name, media in self.media.items()}
        return read_record(raw, where, position, partial(read_media_messages, tokens=tokens))

    @property
    def features(self) -> datasets.Features:
        """Columns of an encoded conversation."""
        return datasets.Features({**super().features, **MEDIA})

    @property
    def predict_features(self) -> datasets.Features:
        """Columns of a prompt."""
        return datasets.Features({**PROMPT_FEATURES, **MEDIA})

    def decides_encoding(self) -> list[Any]:
        """Also placeholders, folder, and where features come from."""
        placeholders = [
            [name, media.token, media.number, media.start, media.end, media.reader.decides_reading()]
            for name, media in self.media.items()
        ]
        return [*super().decides_encoding(), placeholders, str(self.folder)]

    def encode_record(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """Token ids, labels and weights, and the files of one conversation."""
        example = self.encoder.encode(self.resolved(record, source), source.system_prompt)
        self._check_files(record, example.media)
        return {**self.columns(example), "media": json.dumps(example.media)}

    def predict_row(self, record: Record, source: SourceConfig) -> dict[str, Any]:
        """The prompt, and its files."""
        prompt = self.encoder.encode_prompt(self.resolved(record, source), source.system_prompt)
        self._check_files(record, prompt.media)
        return {**prompt_columns(record, prompt), "media": json.dumps(prompt.media)}

    def fingerprints(self) -> list[str]:
        """Also of what the files hold."""
        rows = zip(super().fingerprints(), self.examples["predict"]["media"], strict=True)
        return [fingerprint(own, self._contents(json.loads(media))) for own, media in rows]

    def _contents(self, files: dict[str, list[str]]) -> list[str]:
        found = [(self.media[name].reader, path) for name, paths in files.items() for path in paths]
        return [reader.fingerprint(path, self.cache_dir) for reader, path in found]

    def predict_item(self, row: dict[str, Any], index: int) -> MediaItem:
        """One prompt."""
        return MediaItem(**vars(prompt_item(row, index)), media=json.loads(row["media"]))

    def resolved(self, record: Record, source: SourceConfig) -> Record:
        """The record with the files' paths from where this process runs."""
        base = self.folder
        if base is None:
            path = Path(os.path.expanduser(source.path or "."))
            base = path if path.is_dir() else path.parent
        messages: list[Message] = []
        for message in record.messages:
            own = {
                key: [
                    path if path.startswith("data:") else str(base / os.path.expanduser(path)) for path in message[key]
                ]
                for key in (PLURALS[name] for name in self.media)
                if key in message
            }
            messages.append({**message, **own})
        return replace(record, messages=messages)

    def _check_files(self, record: Record, files: dict[str, list[str]]) -> None:
        """Drop a record with a file that cannot be read."""
        for name, paths in files.items():
            for path in paths:
                try:
                    self.media[name].reader.check(path)
                except UnreadableMediaError as error:
                    raise Dropped(f"unreadable_{name}", f"{record.where}: {error}") from error

    def collate(self, rows: list[dict[str, Any]], planned: PlannedBatch) -> MediaBatch:
        """A packed row, or padded rows, with what the placeholders stand for."""
        batch = super().collate(rows, planned)
        owners = [(f"{row['dataset']}/{row['id']}", json.loads(row["media"])) for row in rows]
        ids = batch.input_ids.flatten().tolist()
        placeholders = {
            name: torch.tensor(
                [position for position, own in enumerate(ids) if own == media.token_id], dtype=torch.long
            )
            for name, media in self.media.items()
        }
        return MediaBatch(**vars(batch), media=self.load(owners), placeholders=placeholders)

    def load(self, owners: Sequence[tuple[str, dict[str, list[str]]]]) -> dict[str, list[Tensor]]:
        """What the readers give for all files, by modality; a modality without files is left out.

        Args:
            owners: Where each group of files comes from, and its files by modality.

        Raises:
            RecordError: If a file cannot be read any more, or gives something else than the others.
        """
        found: dict[str, list[Tensor]] = {}
        for name, media in self.media.items():
            parts: list[list[Tensor]] = []
            for where, files in owners:
                for path in files.get(name, []):
                    try:
                        parts.append(media.reader.read(path))
                    except UnreadableMediaError as error:
                        fix = "It could be read when the data were encoded; put it back, and resume."
                        raise RecordError(where, PLURALS[name], str(error), fix) from error
                    shapes = [[list(each.shape) for each in part] for part in (parts[0], parts[-1])]
                    if shapes[0] != shapes[1]:
                        problem = f"{path} gives {shapes[1]}, and others give {shapes[0]}"
                        raise RecordError(where, PLURALS[name], problem, "Use one processor, or make the cache again.")
            if parts:
                found[name] = [torch.stack(each) for each in zip(*parts, strict=True)]
        return found
