"""What modules share whose model scores sequences instead of answering.

B rows, T tokens, N scores, K labels
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import CHECKPOINT_KEY, Saved, head_of, read_head
from lit_alignment.data.asking import Conversation
from lit_alignment.data.batching.collate import ScoreBatch, local_positions
from lit_alignment.data.batching.items import ItemBatch
from lit_alignment.data.conversation import ConversationDataModule, conversations_of
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.generation.engine import EngineNeeds, ItemRequests, Request
from lit_alignment.hooks import Stage
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.head import scores_at
from lit_alignment.models.loading import BackboneConfig, HeadConfig
from lit_alignment.models.logprobs import row_inputs
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.paths import local_path


class ScoringModule(AlignmentModule):
    """A decoder with a scalar or classification head, read at given tokens, in place of its output embedding.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library, beside which the head trains; without these and `adapter` all train.
        adapter: An existing adapter, frozen or to be trained further, with its head.
        tokens: Special and new tokens.
        optimizer: Optimizer and schedule.
        head: What the scores are of.
    """

    family = "scores"
    head: HeadConfig
    shares_batches = True
    progress_bar = ("loss", "accuracy")

    def __init__(
        self,
        backbone: BackboneConfig,
        peft: PeftConfig | None,
        adapter: AdapterConfig | None,
        tokens: TokensConfig,
        optimizer: OptimizerConfig,
        head: HeadConfig,
    ) -> None:
        """Load the tokenizer; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer)
        tell_pad_apart(self.tokenizer)
        self.head = replace(head, pad=self.tokenizer.pad_token)

    def configure_model(self) -> None:
        """Load the weights, once."""
        super().configure_model()
        if self.tokenizer.pad_token_id in conversations_of(self.trainer).encoder.last_ids():
            rank_zero_warn(
                f"conversations end with {self.tokenizer.pad_token}, which is the padding token too: this run is fine "
                "but transformers' own forward would read an exported model's scores one token too early. "
                "Give the tokenizer another padding token."
            )

    def scores(self, batch: ScoreBatch, sequence: SequenceGroup | None = None) -> Tensor:
        """Scores at the batch's positions, fp32, [N, K].

        Args:
            batch: Whole rows.
            sequence: Ranks that have the same batch, and compute a part of its tokens each.
        """
        inputs = row_inputs(self.network, batch, sequence)
        if sequence is None:
            return scores_at(self.network, batch.read_at, **inputs)
        # Only packed rows are shared, which stand alone: a position counted through the rows is then a position.
        tokens = sequence.own(batch.input_ids.shape[1])
        local = local_positions(batch.read_at, tokens) if batch.local is None else batch.local
        found = scores_at(self.network, batch.read_at.index_select(0, local) - tokens.start, **inputs)
        scores = found.new_zeros(len(batch.read_at), found.shape[1])
        return sequence.sum(scores.index_copy(0, local, found))

    def step(self, batch: ScoreBatch, stage: Stage) -> Tensor:
        """Scores of the whole batch on every rank that shares it, of which one counts."""
        scores = self.scores(batch, self.sequence)
        if self.sequence is not None and self.sequence.rank > 0:
            batch = replace(batch, weights=torch.zeros_like(batch.weights))
        return self.scored_step(scores, batch, stage)

    @abstractmethod
    def scored_step(self, scores: Tensor, batch: ScoreBatch, stage: Stage) -> Tensor:
        """The batch's share of the loss in training; else its loss, after adding it to the metrics.

        Args:
            scores: At the batch's positions, [N, K].
            batch: What they should be.
            stage: What it is for.
        """

    # Predictions.

    def check_scores(self) -> None:
        """Tables of scored records are welcome."""
        return

    def predict_step(self, batch: ItemBatch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """What the scores of each item say, in the one file of `prediction_settings`."""
        (name,) = self.prediction_settings()
        scores = torch.split(self.scores(batch.scores), batch.scores.groups)
        return {name: [self.predicted(item, own) for item, own in zip(batch.items, scores, strict=True)]}

    def predictions(self, conversations: Sequence[Conversation], batch_size: int) -> list[dict[str, Any]]:
        """What `predict` says of each conversation, in order, without a Trainer.

        Args:
            conversations: What is scored.
            batch_size: Conversations to score together.
        """
        data, found = self.data_as(ConversationDataModule).whole(), list[dict[str, Any]]()  # type: ignore[type-abstract]
        with self.answering():
            items = self.asked(conversations)
            for start in range(0, len(items), batch_size):
                batch: Any = data.predict_collate(items[start : start + batch_size])
                (lines,) = self.predict_step(self.transfer_batch_to_device(batch, self.device, 0), 0).values()
                found += lines
        return found

    def load_trained(self, saved: Saved, path: str | Path) -> None:
        """Also take over what was measured."""
        super().load_trained(saved, path)
        if saved.head is not None:
            self.take_over(saved.head)

    @abstractmethod
    def predicted(self, item: Any, scores: Tensor) -> dict[str, Any]:
        """What the scores of one item, [N, K], say."""

    @abstractmethod
    def sequences(self, item: Any) -> list[list[int]]:
        """Token ids of the N sequences of an item, each with one score at its last token, for engines that read those.

        Raises:
            ConfigError: If its scores stand elsewhere.
        """

    def predict_requests(self, items: Sequence[Any], name: str) -> list[ItemRequests]:
        """The sequences of each item, whose raw scores an engine is asked for."""
        return [
            ItemRequests([Request(ids) for ids in self.sequences(item)], partial(self._of_engine, item))
            for item in items
        ]

    def _of_engine(self, item: Any, scores: list[Tensor]) -> dict[str, Any]:
        return self.predicted(item, torch.stack(scores))

    def prepare_for_engine(self, saved: Saved | None, folder: Path) -> EngineNeeds:
        """Load the model in transformers, for scores to compare with, and take over what was measured."""
        if saved is None:
            return EngineNeeds(scores=True, network=self.load_model().eval())
        if saved.head is not None:
            self.take_over(saved.head)
        return EngineNeeds(scores=True, network=restore(saved)[0])

    def measure(self, values: dict[str, float]) -> None:
        """Keep what was measured with the model beside it."""
        self.head = replace(self.head, measured={**self.head.measured, **values})

    def checkpoint_metadata(self) -> dict[str, Any]:
        """The head: its labels, and what was measured."""
        return {**super().checkpoint_metadata(), "head": asdict(self.head) | {"labels": list(self.head.labels)}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what was measured, and refuse a head with other labels."""
        super().on_load_checkpoint(checkpoint)
        self.take_over(read_head(checkpoint[CHECKPOINT_KEY].get("head"), "the checkpoint"))

    def take_over(self, found: HeadConfig) -> None:
        """Take over what was measured with a trained head.

        Raises:
            CheckpointError: If it has other labels.
        """
        if (found.labels, found.problem) != (self.head.labels, self.head.problem):
            raise CheckpointError(
                f"the checkpoint scores {list(found.labels)} ({found.problem}), this model {list(self.head.labels)} "
                f"({self.head.problem}). Set model.labels and model.problem as they were in training."
            )
        self.head = replace(self.head, measured=found.measured)


def tell_pad_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer that pads with EOS another padding token from its own vocabulary, if it has one.

    Our scores are read at given positions, but transformers finds the last token of a row by the padding token's
    id, and would pass over an EOS that ends the conversation.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    wanted = [tokenizer.unk_token, *special]
    other = next((token for token in wanted if token is not None and token != tokenizer.eos_token), None)
    if other is not None:
        tokenizer.pad_token = other


def existing_head(backbone: BackboneConfig, adapter: AdapterConfig | None) -> HeadConfig | None:
    """The head of an exported classifier that is trained on or used, or None for a plain language model.

    Args:
        backbone: The pretrained model.
        adapter: An existing adapter, whose own head goes first.
    """
    found = None if adapter is None else head_of(Path(adapter.path).expanduser())
    return found or head_of(Path(local_path(backbone.path)).expanduser())


def check_positive(name: str, value: float) -> None:
    """Refuse a negative setting.

    Raises:
        ConfigError: Naming it.
    """
    if value < 0:
        raise ConfigError(f"model.{name} is {value}; use 0 or more.")
