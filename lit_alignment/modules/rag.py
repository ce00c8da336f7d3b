"""End-to-end RAG: a retriever and a generator trained together.

B questions, K passages of a question, T answer tokens, D width
"""

from collections.abc import Sequence
from typing import Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torchmetrics import Metric

from lit_alignment.data.passages import Passage
from lit_alignment.data.rag import RAGBatch, RAGItem
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.hooks import Stage
from lit_alignment.losses import (
    emdr2_loss,
    leave_one_out_loss,
    perplexity_distillation_loss,
    rag_sequence_loss,
    rag_token_loss,
    replug_loss,
)
from lit_alignment.metrics import TokenMean
from lit_alignment.metrics.retrieval import ranking_metrics
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.dual_encoder import RetrieverConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.modules.retriever import RetrieverModule
from lit_alignment.modules.retrieving import Decoding, RetrievingModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import IndexConfig

Objective = Literal[
    "language_modeling",
    "rag_sequence",
    "rag_token",
    "emdr2",
    "perplexity_distillation",
    "leave_one_out",
    "replug",
]
MARGINAL = ("rag_sequence", "rag_token")
RECALL_AT = (1, 5, 20)


class RAGModule(RetrievingModule):
    """A generator that answers with retrieved passages, and the retriever, trained by what helps the generator.

    `rag_sequence` and `rag_token` train both on the likelihood of the answer, summed over the passages, each in a
    sequence of its own. The others train the generator on the answer after all passages together, and the retriever on
    what the generator, without gradient, makes of single passages; `language_modeling` trains the generator alone.

    loss of an optimizer step = sum of the answers' losses / number of trained tokens, plus, for the others,
    retriever_weight * mean over questions of the retriever's loss; both over all micro-batches and ranks

    Args:
        backbone: The pretrained generator.
        retriever: The text encoder.
        index: The passages.
        objective: What is trained on.
        num_passages: K, passages of each question.
        train_retriever: Nothing of it, its query tower, or both towers, for which the index has to be refreshed.
        train_generator: Whether the generator learns.
        over_retrieve: Take this many times as many passages from the index, encode them anew, and keep the best; where
            the index lags behind its encoder, its order is not that of the encoder.
        retriever_weight: Weight of the retriever's own loss.
        retriever_learning_rate: Highest learning rate of the retriever; that of the optimizer by default.
        target_temperature: Flattens (above 1) what the retriever is distilled from.
        peft: New adapters of the generator; without these and `adapter` all its weights train.
        adapter: An adapter that exists, frozen or to go on with.
        tokens: Special and new tokens of the generator.
        optimizer: Optimizer and schedule.
        generation: Named ways to answer in `predict`.
        decoding: How passages take part: all in one prompt (`concatenate`), or one in each and summed over, by whole
            answers (`rag_sequence`, `rag_sequence_fast`) or by tokens (`rag_token`). By default as in training.
    """

    beside = "retriever and index"
    progress_bar = ("loss", *(f"recall@{k}" for k in RECALL_AT))

    def __init__(
        self,
        backbone: BackboneConfig,
        retriever: RetrieverConfig,
        index: IndexConfig,
        objective: Objective = "rag_sequence",
        num_passages: int = 5,
        train_retriever: Literal["none", "query", "both"] = "query",
        train_generator: bool = True,
        over_retrieve: int = 1,
        retriever_weight: float = 1.0,
        retriever_learning_rate: float | None = None,
        target_temperature: float = 1.0,
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        generation: dict[str, DecodingConfig] | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        """Check the settings; weights and index come in `configure_model`."""
        trained: Decoding = "concatenate"
        if objective == "rag_sequence" or objective == "rag_token":
            trained = objective
        super().__init__(
            backbone,
            retriever,
            index,
            num_passages,
            train_retriever,
            train_generator,
            over_retrieve,
            peft,
            adapter,
            tokens,
            optimizer,
            generation,
            decoding or trained,
        )
        self.objective, self.retriever_weight = objective, retriever_weight
        self.retriever_learning_rate, self.target_temperature = retriever_learning_rate, target_temperature
        self._check_settings()

    def _check_settings(self) -> None:
        """Refuse what would train nothing, or something else than it says."""
        learns = self.train_retriever != "none"
        if learns and self.num_passages < 2:
            raise ConfigError(
                f"model.num_passages is {self.num_passages}: the softmax over one passage is always 1, so the "
                "retriever would get no gradient. Use 2 or more, or set train_retriever to none."
            )
        if learns and self.objective == "language_modeling":
            raise ConfigError(
                "model.objective: language_modeling does not train a retriever. Choose another objective, "
                "or set train_retriever to none."
            )
        if not learns and self.objective not in ("language_modeling", *MARGINAL):
            raise ConfigError(
                f"model.objective: {self.objective} is a loss of the retriever, and train_retriever is none. "
                "Use language_modeling, or train the retriever."
            )
        if not learns and not self.train_generator:
            raise ConfigError("model.train_generator is false and train_retriever none: nothing would learn.")
        if self.train_retriever == "query" and self.retriever.towers == "shared":
            raise ConfigError(
                "model.train_retriever: the query tower cannot train alone while the towers are shared. "
                "Set retriever.towers to separate, or train_retriever to both."
            )
        if self.objective == "leave_one_out" and self.num_passages < 2:
            raise ConfigError("model.objective: leave_one_out needs num_passages of 2 or more.")

    # Loss.

    def stage_metrics(self) -> dict[str, Metric]:
        """Means over trained tokens (`loss`) and over questions."""
        return {name: TokenMean() for name in ("loss", *self._names())}

    def step(self, batch: RAGBatch, stage: Stage) -> Tensor:
        """Loss of the answers and of the retriever."""
        passages, scores = self.retrieve([item.query for item in batch.items])
        answer_losses, retriever_losses, tokens = self.losses(batch.items, passages, scores)
        counted = scores.new_tensor(batch.weights)  # [B]
        answers = (answer_losses * counted).sum()
        means = self._found(batch, passages, scores)
        if stage == "train":
            for name, (total, weight) in means.items():
                if float(weight) > 0:
                    self.log(f"train/{name}", total / weight, batch_size=max(1, int(weight)))
            loss = self.step_loss(answers, batch.window_weight)
            if retriever_losses is None:
                return loss
            own = self.retriever_weight * (retriever_losses * counted).sum()
            return loss + self.step_loss(own, batch.window_examples)
        metrics = self.metrics_of(stage)
        metrics["loss"].update(answers, (tokens * counted).sum())
        if retriever_losses is not None:
            means["retriever_loss"] = (retriever_losses * counted).sum(), counted.sum()
        for name, (total, weight) in means.items():
            metrics[name].update(total, weight)
        return answers

    def losses(
        self, items: Sequence[RAGItem], passages: Sequence[Sequence[Passage]], scores: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Loss of each answer, loss of the retriever for each question or None, and trained weight of each answer, [B].

        Args:
            items: The questions with their answers.
            passages: K passages of each.
            scores: Their scores, [B, K].
        """
        if self.objective in MARGINAL:
            logps, weights = self.token_logps(items, [[[each] for each in own] for own in passages])
            if self.objective == "rag_token":
                return rag_token_loss(scores, logps, weights), None, weights.sum(-1)
            return rag_sequence_loss(scores, (logps * weights[:, None]).sum(-1)), None, weights.sum(-1)
        together, weights = self.token_logps(items, [[own] for own in passages])
        answers = -(together[:, 0] * weights).sum(-1)
        if self.train_retriever == "none":
            return answers, None, weights.sum(-1)
        if not self.train_generator:
            answers = answers.detach()
        return answers, self._retriever_losses(items, passages, scores), weights.sum(-1)

    def _retriever_losses(
        self, items: Sequence[RAGItem], passages: Sequence[Sequence[Passage]], scores: Tensor
    ) -> Tensor:
        """Loss of the retriever for each question, [B], from what the generator makes of parts of its passages."""
        if self.objective == "leave_one_out":
            contexts = [[[*own[:k], *own[k + 1 :]] for k in range(len(own))] for own in passages]
        else:
            contexts = [[[each] for each in own] for own in passages]
        with torch.no_grad():
            logps, weights = self.token_logps(items, contexts)
            sums = (logps * weights[:, None]).sum(-1)  # [B, K]
            means = sums / weights.sum(-1, keepdim=True)
        match self.objective:
            case "emdr2":
                return emdr2_loss(scores, sums)
            case "leave_one_out":
                return leave_one_out_loss(scores, means, self.target_temperature)
            case "replug":
                return replug_loss(scores, means, self.target_temperature)
            case _:
                return perplexity_distillation_loss(scores, means, self.target_temperature)

    # Metrics.

    def _names(self) -> list[str]:
        ks = [k for k in RECALL_AT if k <= self.num_passages]
        return ["passage_entropy", "retriever_loss", "mrr", *(f"recall@{k}" for k in ks)]

    def _found(
        self, batch: RAGBatch, passages: Sequence[Sequence[Passage]], scores: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums over the questions, and the numbers of these, by name; fillers do not count."""
        log_prior = scores.detach().log_softmax(-1)
        counted = scores.new_tensor(batch.weights)
        entropy = -(log_prior.exp() * log_prior).sum(-1)
        sums = {"passage_entropy": ((entropy * counted).sum(), counted.sum())}
        ks = [k for k in RECALL_AT if k <= self.num_passages]
        judged = [
            ranking_metrics([passage.id for passage in own], item.relevant, ks)
            for item, own, weight in zip(batch.items, passages, batch.weights, strict=True)
            if item.relevant and weight
        ]
        number = scores.new_tensor(len(judged))
        for name in ["mrr", *(f"recall@{k}" for k in ks)]:
            sums[name] = scores.new_tensor(sum(metrics[name] for metrics in judged)), number
        return sums

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """Also the perplexity; no recall where no relevant passage is known."""
        metrics = self.metrics_of(stage)
        loss = metrics.pop("loss").compute()
        known = {name: metric.compute() for name, metric in metrics.items() if metric.update_called}
        return {"loss": loss, "perplexity": loss.exp(), **{n: v for n, v in known.items() if v.isfinite()}}

    # The index.

    def retrieval_config(self) -> tuple[RetrieverConfig, IndexConfig]:
        """The retriever and the index."""
        return self.retriever, self.index_config

    def passage_encoder(self) -> AlignmentModule:
        """The retriever alone."""
        return RetrieverModule(self.retriever, self.index_config)

    # Optimizer.

    def other_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """That of the retriever."""
        rate = self.retriever_learning_rate or self.optimizer_config.learning_rate
        return [(list(self.encoder.parameters()), rate)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the retriever's gradient norm besides."""
        super().on_before_optimizer_step(optimizer)
        if self.train_retriever != "none":
            gradients = [p.grad for p in self.encoder.parameters() if p.grad is not None]
            self.log("train/retriever_grad_norm", torch.nn.utils.get_total_norm(gradients))
