"""End-to-end RAG: a retriever and a generator trained together.

B questions, K passages of a question, T answer tokens, D width
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torchmetrics import Metric

from lit_alignment.checkpoints.export import ExportParts
from lit_alignment.checkpoints.hf_folder import Form
from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.passages import Passage
from lit_alignment.data.rag import RAGBatch, RAGDataModule, RAGItem
from lit_alignment.errors import ConfigError
from lit_alignment.files import config_from
from lit_alignment.generation.engine import EngineNeeds, ItemRequests, Request, Response
from lit_alignment.generation.marginal import (
    answer_token_logps,
    generate_by_token,
    marginal_requests,
    retrieved_passages,
)
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.hooks import Stage
from lit_alignment.metrics import TokenMean
from lit_alignment.metrics.retrieval import retrieval_sums
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.dual_encoder import DUAL, DualEncoder, RetrieverConfig, load_retriever, save_retriever
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.modules.retriever import RetrieverModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import IndexConfig
from lit_alignment.retrieval.objectives import Objective, check_objective, objective_losses
from lit_alignment.retrieval.passage_retriever import PassageRetriever, TrainedTowers

Decoding = Literal["concatenate", "rag_sequence", "rag_sequence_fast", "rag_token"]
RECALL_AT = (1, 5, 20)


@dataclass(frozen=True)
class RAGAnswers:
    """What decides answers besides weights and passages; arguments of RAGModule."""

    objective: Objective
    num_passages: int
    decoding: Decoding
    train_retriever: TrainedTowers


class RAGModule(GenerativeModule):
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
        adapter: An existing adapter, frozen or to be trained further.
        tokens: Special and new tokens of the generator.
        optimizer: Optimizer and schedule.
        generation: Decoding configurations of `predict` by name.
        decoding: How passages take part: all in one prompt (`concatenate`), or one in each and summed over, by whole
            answers (`rag_sequence`, `rag_sequence_fast`) or by tokens (`rag_token`). By default as in training.
    """

    family = "passages"
    title = "retrieval-augmented generation"
    data_classes = (RAGDataModule,)
    beside, keeps_precision = "retriever and index", ("dual",)  # the index was made with its weights as they are
    progress_bar = ("loss", *(f"recall@{k}" for k in RECALL_AT))

    def __init__(
        self,
        backbone: BackboneConfig,
        retriever: RetrieverConfig,
        index: IndexConfig,
        objective: Objective = "rag_sequence",
        num_passages: int = 5,
        train_retriever: TrainedTowers = "query",
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
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        self._retriever = PassageRetriever(retriever, index, num_passages, over_retrieve, train_retriever)
        self.objective, self.num_passages = objective, num_passages
        self.train_retriever, self.train_generator = train_retriever, train_generator
        self.retriever_weight, self.retriever_learning_rate = retriever_weight, retriever_learning_rate
        self.target_temperature = target_temperature
        self._recall_at = [k for k in RECALL_AT if k <= num_passages]
        as_trained: Decoding = "concatenate"
        if objective == "rag_sequence" or objective == "rag_token":
            as_trained = objective
        self.decoding = decoding or as_trained
        self.dual: DualEncoder | None = None  # the retriever's towers, under whose name checkpoints have them
        check_objective(objective, num_passages, train_retriever, train_generator, retriever)

    @property
    def data(self) -> RAGDataModule:
        """The data module, which puts passages into conversations."""
        return self.data_as(RAGDataModule)

    # Retriever.

    @property
    def passage_retriever(self) -> PassageRetriever:
        """What retrieves the passages of questions."""
        return self._retriever

    def load_extra_networks(self, device_type: str = "cpu") -> None:
        """Load the retriever's towers and its index."""
        self.dual = self.passage_retriever.load()
        if not self.train_generator:
            self.network.requires_grad_(False)

    def extra_networks(self) -> dict[str, nn.Module]:
        """The towers of the retriever, which may be one."""
        query, passage = self.passage_retriever.encoder.query_tower, self.passage_retriever.encoder.passage_tower
        return {"retriever": query} if query is passage else {"query tower": query, "passage tower": passage}

    def export_parts(self, saved: Saved, network: nn.Module, form: Form) -> ExportParts:
        """Also the retriever, in `retriever/`."""
        retriever = self.passage_retriever
        encoder = load_retriever(retriever.config) if self.is_sharded else retriever.encoder
        trained = saved.networks.get(DUAL, {})
        return replace(
            super().export_parts(saved, network, form),
            beside=lambda folder: save_retriever(encoder, folder / "retriever", trained),
        )

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Also the retriever's settings, and whether the generator stays as it is."""
        retriever = asdict(self.passage_retriever.config)
        method = asdict(RAGAnswers(self.objective, self.num_passages, self.decoding, self.train_retriever))
        about = {"retriever": retriever, "frozen": not self.train_generator, "method": method}
        return {**super().checkpoint_metadata(), **about}

    def retrieve(self, queries: Sequence[str]) -> tuple[list[list[Passage]], Tensor]:
        """The K best passages of each query, and their scores with the gradient that trains the retriever, [B, K].

        Every process searches its part of a sharded index, but in predict, where some have more batches.
        """
        several = self._trainer is not None and self.trainer.world_size > 1 and self.trainer.state.fn != "predict"
        return self.passage_retriever.retrieve(
            queries, together=several and self.passage_retriever.index_config.sharded
        )

    def on_fit_start(self) -> None:
        """Refuse a stale index, and passages that learn while nobody encodes them anew."""
        super().on_fit_start()
        self.passage_retriever.check_kept_up()

    def on_validation_start(self) -> None:
        """Refuse a stale index, unless it lags behind a training that continues."""
        if self.trainer.state.fn != "fit":
            self.passage_retriever.check_index()

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Refuse a stale index."""
        super().on_predict_start()
        self.passage_retriever.check_index()

    @classmethod
    def from_saved(cls, saved: Saved, path: str | Path, device: str | torch.device = "auto", **settings: Any) -> Self:
        """As of the base.

        Raises:
            ConfigError: If no index is given, or it was made by another encoder.
        """
        if saved.family == cls.family and "index" not in settings:
            raise ConfigError(f"{path}: holds no index. Give it: from_checkpoint(path, index=IndexConfig(FOLDER)).")
        module = super().from_saved(saved, path, device, **settings)
        module.passage_retriever.check_index()
        return module

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """Also the retriever, and what decides answers; the index is not a part of a checkpoint."""
        own = vars(config_from(RAGAnswers, saved.method, "the checkpoint")) if saved.method else {}
        return {**super().arguments_of(saved), **own, "retriever": saved.retriever, "train_generator": not saved.frozen}

    def _within_positions(self, items: Sequence[Any], decoding: DecodingConfig) -> DecodingConfig:
        """As it is: passages are cut so that a prompt is no longer than in training."""
        return decoding

    def method_settings(self) -> dict[str, Any]:
        """What is trained on, and of how many passages."""
        return {"objective": self.objective, "num_passages": self.num_passages, "train_retriever": self.train_retriever}

    # Loss.

    def stage_metrics(self) -> dict[str, Metric]:
        """Means over trained tokens (`loss`) and over questions."""
        retrieval = [f"recall@{k}" for k in self._recall_at]
        return {name: TokenMean() for name in ("loss", "passage_entropy", "retriever_loss", "mrr", *retrieval)}

    def step(self, batch: RAGBatch, stage: Stage) -> Tensor:
        """Loss of the answers and of the retriever."""
        passages, scores = self.retrieve([item.query for item in batch.items])
        answer_losses, retriever_losses, tokens = self.losses(batch.items, passages, scores)
        counted = torch.tensor(batch.weights).to(scores, non_blocking=True)  # [B]
        answers = (answer_losses * counted).sum()
        ids = [[passage.id for passage in own] for own in passages]
        means = retrieval_sums(ids, [item.relevant for item in batch.items], batch.weights, scores, self._recall_at)
        if stage == "train":
            for name, (total, weight) in means.items():
                if weight > 0:
                    self.log(f"train/{name}", total / weight, batch_size=max(1, int(weight)))
            loss = self.step_loss(answers, batch.window_weight)
            if retriever_losses is None:
                return loss
            own = self.retriever_weight * (retriever_losses * counted).sum()
            return loss + self.step_loss(own, batch.window_examples)
        metrics = self.metrics_of(stage)
        metrics["loss"].update(answers, (tokens * counted).sum())
        if retriever_losses is not None:
            means["retriever_loss"] = (retriever_losses * counted).sum(), float(sum(batch.weights))
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
        learns = self.train_retriever != "none", self.train_generator
        answer_logps = partial(self.token_logps, items)
        return objective_losses(self.objective, answer_logps, passages, scores, *learns, self.target_temperature)

    # Metrics.

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """Also the perplexity; no recall where no relevant passage is known."""
        metrics = self.metrics_of(stage)
        loss = metrics.pop("loss").compute()
        known = {name: metric.compute() for name, metric in metrics.items() if metric.update_called}
        return {"loss": loss, "perplexity": loss.exp(), **{n: v for n, v in known.items() if v.isfinite()}}

    # Responses.

    def token_logps(
        self, items: Sequence[RAGItem], contexts: Sequence[Sequence[Sequence[Passage]]], with_end: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer token after each context, [B, C, T], and the tokens' weights, [B, T].

        Args:
            items: The questions with their answers.
            contexts: C lists of passages for each.
            with_end: Whether what ends the turn is a part of the answers.
        """
        data, encoder = self.data, self.data.encoder if with_end else self.data.encoder.without_end()
        examples = [
            [encoder.example(item.messages, item.answer or {}, own, item.tools) for own in lists]
            for item, lists in zip(items, contexts, strict=True)
        ]
        return answer_token_logps(self.network, examples, int(self.tokenizer.pad_token_id), data.packing)

    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """The decoding configurations by name, with what decides the passages."""
        made = self.passage_retriever.index.manifest.made_of()
        shared = {"num_passages": self.num_passages, "decoding": self.decoding, **made}
        return {name: settings | shared for name, settings in super().prediction_settings().items()}

    @torch.no_grad()
    def item_requests(self, items: Sequence[RAGItem], decoding: DecodingConfig) -> list[ItemRequests]:
        """The question with all passages, or with each by itself."""
        passages, scores = self.retrieve([item.query for item in items])
        return [self._requests(*each, decoding) for each in zip(items, passages, scores, strict=True)]

    def _requests(
        self, item: RAGItem, passages: list[Passage], scores: Tensor, decoding: DecodingConfig
    ) -> ItemRequests:
        if self.decoding == "concatenate":
            request = self._request(item, passages, decoding)
            return ItemRequests([request], lambda results: Response(results[0], retrieved_passages(passages, scores)))

        def score(texts: list[str], with_end: bool) -> Tensor:
            said = [replace(item, answer={"role": "assistant", "content": text}) for text in texts]
            tokens, weights = self.token_logps(said, [[[each] for each in passages]] * len(said), with_end)
            return (tokens * weights[:, None]).sum(-1)

        each = [self._request(item, [passage], decoding) for passage in passages]
        return marginal_requests(each, passages, scores, score if self.decoding == "rag_sequence" else None)

    @torch.no_grad()
    def respond(
        self, items: Sequence[RAGItem], decoding: DecodingConfig, on_text: Callable[[str], None] | None = None
    ) -> list[Response]:
        """Responses, with the passages behind them and their scores; only one from a single prompt comes in pieces."""
        if self.decoding != "rag_token" or not items:
            return super().respond(items, decoding, on_text if self.decoding == "concatenate" else None)
        passages, scores = self.retrieve([item.query for item in items])
        requests = [
            [self._request(item, [each], decoding) for each in own] for item, own in zip(items, passages, strict=True)
        ]
        completions = generate_by_token(self.network, self.tokenizer, requests, scores.log_softmax(-1))
        return [
            Response(found, retrieved_passages(own, row))
            for found, own, row in zip(completions, passages, scores, strict=True)
        ]

    def _request(self, item: RAGItem, passages: Sequence[Passage], decoding: DecodingConfig) -> Request:
        return self.request(self.data.encoder.prompt(item.messages, passages, item.tools).input_ids, decoding)

    def prepare_for_engine(self, saved: Saved | None, folder: Path) -> EngineNeeds:
        """Load the retriever: an engine generates after the passages.

        Raises:
            ConfigError: If the decoding needs the generator itself, or the index is stale.
        """
        if self.decoding not in ("concatenate", "rag_sequence_fast"):
            raise ConfigError(
                f"model.decoding: {self.decoding} needs the generator's own probabilities of other tokens than it "
                "has drawn. With engine: vllm use rag_sequence_fast or concatenate."
            )
        self.dual = self.passage_retriever.load()
        if saved is not None:
            self.dual.load_state_dict(saved.networks.get(DUAL, {}), strict=False)
        self.dual.eval()
        self.passage_retriever.check_index()
        return EngineNeeds()

    # The index.

    def retrieval_config(self) -> tuple[RetrieverConfig, IndexConfig]:
        """The retriever and the index."""
        return self._retriever.config, self._retriever.index_config

    def passage_encoder(self) -> AlignmentModule:
        """The retriever alone."""
        return RetrieverModule(*self.retrieval_config())

    # Optimizer.

    def other_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """That of the retriever."""
        rate = self.retriever_learning_rate or self.optimizer_config.learning_rate
        return [(list(self.passage_retriever.encoder.parameters()), rate)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the retriever's gradient norm besides."""
        super().on_before_optimizer_step(optimizer)
        if self.train_retriever != "none":
            gradients = [p.grad for p in self.passage_retriever.encoder.parameters() if p.grad is not None]
            self.log("train/retriever_grad_norm", torch.nn.utils.get_total_norm(gradients))
