"""A retriever by itself: contrastive warm-up on questions with their passages, and the encoding of passages.

B questions, N passages in a batch, D width
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.passages import format_passage
from lit_alignment.data.retriever import PassageBatch, PassageDataModule, QuestionBatch, RetrieverDataModule
from lit_alignment.errors import ConfigError
from lit_alignment.hooks import Stage
from lit_alignment.losses import info_nce_loss
from lit_alignment.metrics import TokenMean
from lit_alignment.models.dual_encoder import DualEncoder, RetrieverConfig, load_retriever
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import IndexConfig


class RetrieverModule(AlignmentModule):
    """A dual encoder, trained so that each question is nearest to its own passage; `predict` encodes passages.

    loss of an optimizer step = mean over its questions of InfoNCE among the passages of their own micro-batch

    Args:
        retriever: The encoder.
        index: Where `lit-alignment index build` puts the encoded passages.
        optimizer: Optimizer and schedule.
    """

    family = "vectors"
    is_causal = False
    title = "contrastive retrieval training"
    data_classes = (RetrieverDataModule, PassageDataModule)
    progress_bar = ("loss", "in_batch_accuracy")

    def __init__(
        self,
        retriever: RetrieverConfig,
        index: IndexConfig | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5),  # noqa: B008 - frozen
    ) -> None:
        """Load the tokenizer; the weights come in `configure_model`."""
        backbone = BackboneConfig(retriever.path, revision=retriever.revision, weights=retriever.weights)
        super().__init__(backbone, None, None, TokensConfig(), optimizer)
        self.retriever, self.index_config = retriever, index

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """The encoder."""
        return {"retriever": saved.retriever}

    def configure_model(self) -> None:
        """Load the weights, once."""
        if self.trainer.state.fn == "fit":
            self.forget_loaded()
        if self.model is None:
            self.load_model()

    def load_model(self, *_: Any, **__: Any) -> nn.Module:
        """Load the weights without a Trainer; how a language model is held does not apply."""
        self.model = load_retriever(self.retriever)
        return self.model

    @property
    def encoder(self) -> DualEncoder:
        """The loaded encoder."""
        network = self.network
        if not isinstance(network, DualEncoder):
            raise TypeError(f"{type(network).__name__} is no dual encoder.")
        return network

    def stage_metrics(self) -> dict[str, Metric]:
        """Means over questions."""
        return {"loss": TokenMean(), "in_batch_accuracy": TokenMean()}

    def step(self, batch: QuestionBatch, stage: Stage) -> Tensor:
        """InfoNCE of the questions among the passages of their micro-batch."""
        queries = self.encoder.queries(batch.queries)
        passages = self.encoder.passages([self._written(*passage) for passage in batch.passages])
        scores = queries @ passages.T / self.retriever.temperature  # [B, N]
        own = torch.arange(len(queries), device=scores.device)
        same = [[a == b for b in batch.passages] for a in batch.passages[: len(queries)]]
        losses = info_nce_loss(scores, own, torch.tensor(same).to(scores.device, non_blocking=True))
        weights = torch.tensor(batch.weights).to(scores.device, non_blocking=True)
        loss_sum = (losses * weights).sum()
        if stage == "train":
            return self.step_loss(loss_sum, batch.window_weight)
        metrics = self.metrics_of(stage)
        metrics["loss"].update(loss_sum, weights.sum())
        metrics["in_batch_accuracy"].update(((scores.argmax(1) == own) * weights).sum(), weights.sum())
        return loss_sum

    def _written(self, title: str, text: str) -> str:
        return format_passage(self.retriever.passage_format, title, text)

    def retrieval_config(self) -> tuple[RetrieverConfig, IndexConfig]:
        """The encoder, and the index."""
        if self.index_config is None:
            raise ConfigError("model.index is not set: say where the index is, with path and passages.")
        return self.retriever, self.index_config

    def passage_encoder(self) -> AlignmentModule:
        """This module itself."""
        return self

    def checkpoint_metadata(self) -> dict[str, Any]:
        """The retriever's settings."""
        return {"retriever": asdict(self.retriever)}

    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """Embeddings go into an index, not into files of predictions."""
        return {}

    def embed(self, texts: Sequence[str | Mapping[str, str]], kind: Literal["query", "passage"] = "passage") -> Tensor:
        """Vectors of texts, whose inner products are scores, fp32, [B, D].

        Args:
            texts: Queries; or passages, each a text or `{title, text}`.
            kind: Which of the two they are.
        """
        pairs = [("", text) if isinstance(text, str) else (text.get("title", ""), text["text"]) for text in texts]
        with self.answering():
            if kind == "query":
                return self.encoder.queries([text for _, text in pairs])
            return self.encoder.passages([self._written(*each) for each in pairs])

    def predict_step(self, batch: PassageBatch, batch_idx: int) -> Any:
        """Embeddings of the passages, [B, D]."""
        return self.encoder.passages([self._written(item.title, item.text) for item in batch.items])
