"""A generator that looks passages up: towers and index, retrieval, and answers in four ways.

B questions, C contexts, K passages of a question, T answer tokens, D width
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lit_alignment.checkpoints.export import ExportParts
from lit_alignment.checkpoints.hf_folder import Form
from lit_alignment.checkpoints.restore import Saved
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.passages import Passage, format_passage
from lit_alignment.data.rag import RAGDataModule, RAGItem
from lit_alignment.errors import ConfigError
from lit_alignment.generation.marginal import answer_token_logps, generate_by_token
from lit_alignment.generation.settings import Answer, DecodingConfig
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.dual_encoder import DualEncoder, RetrieverConfig, load_retriever, save_retriever, weights_hash
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.generative import GenerativeModule, Question, Response
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import IndexConfig, PassageIndex

Decoding = Literal["concatenate", "rag_sequence", "rag_sequence_fast", "rag_token"]


class RetrievingModule(GenerativeModule):
    """A language model that answers with retrieved passages.

    Args:
        backbone: The pretrained generator.
        retriever: The text encoder.
        index: The passages.
        num_passages: K, passages of each question.
        train_retriever: Nothing of it, its query tower, or both towers.
        train_generator: Whether the generator learns.
        over_retrieve: Take this many times as many passages from the index, encode them anew, and keep the best.
        peft: New adapters of the generator; without these and `adapter` all its weights train.
        adapter: An adapter that exists, frozen or to go on with.
        tokens: Special and new tokens of the generator.
        optimizer: Optimizer and schedule.
        generation: Named ways to answer in `predict`.
        decoding: How passages take part in an answer.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        retriever: RetrieverConfig,
        index: IndexConfig,
        num_passages: int,
        train_retriever: Literal["none", "query", "both"],
        train_generator: bool,
        over_retrieve: int,
        peft: PeftConfig | None,
        adapter: AdapterConfig | None,
        tokens: TokensConfig,
        optimizer: OptimizerConfig,
        generation: dict[str, DecodingConfig] | None,
        decoding: Decoding,
    ) -> None:
        """Keep the settings; weights and index come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        if num_passages < 1 or over_retrieve < 1:
            raise ConfigError("model.num_passages and model.over_retrieve must be 1 or more.")
        self.retriever, self.index_config = retriever, index
        self.num_passages, self.over_retrieve = num_passages, over_retrieve
        self.train_retriever, self.train_generator = train_retriever, train_generator
        self.decoding = decoding
        self.dual: DualEncoder | None = None
        self.passage_index: PassageIndex | None = None
        self.refreshed = False  # whether a callback keeps the index up with the passage tower
        self._known: dict[str, tuple[Tensor, Tensor]] = {}  # what a frozen retriever has found for a query

    @property
    def data(self) -> RAGDataModule:
        """The data module, which puts passages into conversations.

        Raises:
            ConfigError: If it is another method's.
        """
        data = datamodule_of(self.trainer)
        if not isinstance(data, RAGDataModule):
            raise ConfigError(f"RAGModule needs a RAGDataModule, not {type(data).__name__}.")
        return data

    # Models and index.

    def load_extra_networks(self, device_type: str = "cpu") -> None:
        """Load retriever and index."""
        self.load_retriever()
        if not self.train_generator:
            self.network.requires_grad_(False)

    def extra_networks(self) -> dict[str, nn.Module]:
        """The towers of the retriever, which may be one."""
        query, passage = self.encoder.query_tower, self.encoder.passage_tower
        return {"retriever": query} if query is passage else {"query tower": query, "passage tower": passage}

    def export_parts(self, saved: Saved, network: nn.Module, form: Form) -> ExportParts:
        """Also the retriever, in `retriever/`."""
        encoder = load_retriever(self.retriever) if self.is_sharded else self.encoder

        def write(folder: Path) -> None:
            save_retriever(encoder, folder / "retriever", saved.retriever)

        return replace(super().export_parts(saved, network, form), beside=write)

    def load_retriever(self) -> None:
        """Load the towers, and the index that they fit, without a Trainer.

        Raises:
            FileNotFoundError: If there is no index.
            ConfigError: If the index was made by another encoder.
        """
        self.passage_index = PassageIndex.load(self.index_config.path)
        self.dual = load_retriever(self.retriever)
        self.passage_index.check_width(self.dual.width, self.retriever.path)
        self.dual.requires_grad_(self.train_retriever != "none")
        if self.train_retriever == "query":
            self.dual.passage_tower.requires_grad_(False)

    @property
    def encoder(self) -> DualEncoder:
        """The loaded retriever.

        Raises:
            ConfigError: Before `configure_model`.
        """
        if self.dual is None:
            raise ConfigError("the retriever is not loaded yet: call configure_model() or run it in a Trainer.")
        return self.dual

    @property
    def index(self) -> PassageIndex:
        """The loaded index.

        Raises:
            ConfigError: Before `configure_model`.
        """
        if self.passage_index is None:
            raise ConfigError("the index is not loaded yet: call configure_model() or run it in a Trainer.")
        return self.passage_index

    # Retrieval.

    def retrieve(self, queries: Sequence[str]) -> tuple[list[list[Passage]], Tensor]:
        """The K best passages of each query, and their scores with the gradient that trains the retriever, [B, K].

        Scores are inner products divided by the temperature. A frozen retriever is asked each question once, in all
        epochs together.
        """
        if self.train_retriever != "none" or self._searches_together:
            places, scores = self._search(queries)
        else:
            open_ones = list(dict.fromkeys(query for query in queries if query not in self._known))
            if open_ones:
                rows = zip(*self._search(open_ones), strict=True)
                self._known.update(zip(open_ones, rows, strict=True))
            places, scores = (
                torch.stack(rows) for rows in zip(*(self._known[query] for query in queries), strict=True)
            )
        return [self.index.at(row) for row in places], scores

    @property
    def _searches_together(self) -> bool:
        """Whether every process searches its part of the index; not in predict, where some have more batches."""
        return self.index_config.sharded and self.trainer.world_size > 1 and self.trainer.state.fn != "predict"

    def _search(self, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Places of the K best passages of each query, and their scores, both [B, K]."""
        vectors = self.encoder.queries(queries)
        number = self.num_passages * self.over_retrieve
        _, places = self.index.search(vectors, number, together=self._searches_together)
        if self.over_retrieve > 1:
            with torch.no_grad():
                fresh = self._encoded(places)
                _, best = torch.einsum("bd,bkd->bk", vectors, fresh).topk(min(self.num_passages, places.shape[1]))
            places = places.gather(1, best)
        # An index always lags behind towers that learn; the scores do not.
        learns = self.train_retriever == "both"
        passages = (
            self._encoded(places)
            if learns or self.over_retrieve > 1
            else self.index.embeddings(places).to(vectors.dtype)
        )
        return places, torch.einsum("bd,bkd->bk", vectors, passages) / self.retriever.temperature

    def _encoded(self, places: Tensor) -> Tensor:
        """Passages at the given places, encoded by the passage tower as it is now, [B, K, D]."""
        unique, inverse = torch.unique(places, return_inverse=True)
        form = self.retriever.passage_format
        texts = [format_passage(form, passage.title, passage.text) for passage in self.index.at(unique)]
        return self.encoder.passages(texts)[inverse]

    def check_index(self) -> None:
        """Refuse a stale index; asked once the weights are those of the checkpoint, if there is one.

        Raises:
            ConfigError: Saying what differs.
        """
        self.index.check_made_by(self.retriever.decides_passages(), weights_hash(self.encoder.passage_tower))

    def on_fit_start(self) -> None:
        """Refuse a stale index, and passages that learn while nobody encodes them anew."""
        super().on_fit_start()
        if self.train_retriever != "both":
            self.check_index()
        elif not self.refreshed:
            raise ConfigError(
                "model.train_retriever is both, so the index would fall behind its encoder. Add the callback "
                "lit_alignment.IndexRefresh to trainer.callbacks, or train the query tower alone."
            )

    def on_validation_start(self) -> None:
        """Refuse a stale index, unless it lags behind a training that goes on."""
        if self.trainer.state.fn != "fit":
            self.check_index()

    def on_test_start(self) -> None:
        """Refuse a stale index."""
        self.check_index()

    def on_predict_start(self) -> None:
        """Refuse a stale index."""
        super().on_predict_start()
        self.check_index()

    # Answers.

    def token_logps(
        self, items: Sequence[RAGItem], contexts: Sequence[Sequence[Sequence[Passage]]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer token after each context, [B, C, T], and the tokens' weights, [B, T].

        Args:
            items: The questions with their answers.
            contexts: C lists of passages for each.
        """
        data = self.data
        examples = [
            [data.encoder.example(item.messages, item.answer or {}, own, item.tools) for own in lists]
            for item, lists in zip(items, contexts, strict=True)
        ]
        return answer_token_logps(self.network, examples, int(self.tokenizer.pad_token_id), data.packing)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Also the retriever's settings, and whether the generator stays as it is."""
        return {
            **super().checkpoint_metadata(),
            "retriever": asdict(self.retriever),
            "frozen": not self.train_generator,
        }

    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """The generation settings by name, with what decides the passages."""
        shared = {
            "num_passages": self.num_passages,
            "index": self.index.manifest.encoder_hash,
            "decoding": self.decoding,
        }
        return {name: settings | shared for name, settings in super().prediction_settings().items()}

    @torch.no_grad()
    def questions(self, items: Sequence[Any], settings: DecodingConfig) -> list[Question]:
        """The question with all passages, or with each by itself."""
        passages, scores = self.retrieve([item.query for item in items])
        return [
            self._question(item, own, row, settings) for item, own, row in zip(items, passages, scores, strict=True)
        ]

    def _question(self, item: RAGItem, passages: list[Passage], scores: Tensor, settings: DecodingConfig) -> Question:
        found = {"documents": [_document(each) for each in passages], "doc_scores": scores.tolist()}
        if self.decoding == "concatenate":
            together = self._prompt(item, passages)
            return Question([together], settings, lambda answers: Response(answers[0], found))
        prompts = [self._prompt(item, [each]) for each in passages]
        # All that a prompt's beams or draws have found are candidates, and their likelihood decides.
        alone = replace(settings, num_return_sequences=max(settings.num_return_sequences, settings.num_beams))
        alone = replace(alone, logprobs=True)

        def finish(answers: list[list[Answer]]) -> Response:
            return Response(self._marginal(item, passages, scores, answers, settings), found)

        return Question(prompts, alone, finish)

    @torch.no_grad()
    def respond(self, items: Sequence[Any], settings: DecodingConfig) -> list[Response]:
        """Answers, with the passages behind them and their scores."""
        if self.decoding != "rag_token":
            return super().respond(items, settings)
        passages, scores = self.retrieve([item.query for item in items])
        prompts = [[self._prompt(item, [each]) for each in own] for item, own in zip(items, passages, strict=True)]
        log_priors = scores.log_softmax(-1)
        answers = generate_by_token(self.network, self.tokenizer, prompts, log_priors, settings, self.stop)
        return [
            Response(found, {"documents": [_document(each) for each in own], "doc_scores": row.tolist()})
            for found, own, row in zip(answers, passages, scores, strict=True)
        ]

    def _prompt(self, item: RAGItem, passages: Sequence[Passage]) -> list[int]:
        return self.data.encoder.prompt(item.messages, passages, item.tools).input_ids

    def _marginal(
        self,
        item: RAGItem,
        passages: list[Passage],
        scores: Tensor,
        answers: list[list[Answer]],
        settings: DecodingConfig,
    ) -> list[Answer]:
        """The candidates that were generated after each passage, by their likelihood summed over the passages.

        `rag_sequence` asks the generator for each candidate after each passage; `rag_sequence_fast` takes a candidate
        for impossible after passages from which it was not generated.

        Source: Lewis et al. 2020 (arXiv:2005.11401), section 2.5, thorough and fast decoding.
        """
        candidates = {answer.content: answer for beam in answers for answer in reversed(beam)}
        logps = torch.full((len(candidates), len(passages)), -torch.inf)
        for column, beam in enumerate(answers):
            known = {answer.content: answer.logprob for answer in reversed(beam)}
            for line, content in enumerate(candidates):
                if (logp := known.get(content)) is not None:
                    logps[line, column] = logp
        if self.decoding == "rag_sequence":
            said = [replace(item, answer={"role": "assistant", "content": content}) for content in candidates]
            # An answer that the template renders as nothing has nothing to score.
            tokens, weights = self.token_logps(said, [[[each] for each in passages]] * len(said))
            logps = (tokens * weights[:, None]).sum(-1).cpu()
        totals = (scores.log_softmax(-1).cpu() + logps).logsumexp(-1)
        order = totals.argsort(descending=True, stable=True)[: settings.num_return_sequences].tolist()
        found = list(candidates.values())
        kept = [replace(found[line], id=str(place)) for place, line in enumerate(order)]
        for answer, line in zip(kept, order, strict=True):
            answer.logprob = float(totals[line]) if settings.logprobs else None
        return kept


def _document(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "text": passage.text}
