"""What modules share whose model answers prompts."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from lit_alignment.checkpoints.export import ExportParts
from lit_alignment.checkpoints.hf_folder import Form
from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.batching.items import PromptBatch
from lit_alignment.data.conversation import conversations_of
from lit_alignment.generation.engine import Completion, EngineNeeds, ItemRequests, Request, Response, step_seed
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.generation.transformers_engine import TransformersEngine
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.stop_rule import StopRule, generation_config, stop_rule
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.optimization import OptimizerConfig


class GenerativeModule(AlignmentModule):
    """A language model that answers prompts in `predict` and in sample tables.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An existing adapter, frozen or to be trained further.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimizer and schedule.
        generation: Decoding configurations of `predict` by name; each writes a file of its own.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        peft: PeftConfig | None,
        adapter: AdapterConfig | None,
        tokens: TokensConfig,
        optimizer: OptimizerConfig,
        generation: dict[str, DecodingConfig] | None,
    ) -> None:
        """Load the tokenizer; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer)
        self.generation = generation or {"greedy": DecodingConfig()}
        self._stop: StopRule | None = None

    @property
    def stop(self) -> StopRule:
        """What ends a turn: EOS, and what the data module trains as the end of a response."""
        if self._stop is None:
            encoder = conversations_of(self.trainer).encoder
            self._stop = stop_rule(self.tokenizer, encoder.end_of_turn(), encoder.end_of_call())
        return self._stop

    def checkpoint_metadata(self) -> dict[str, Any]:
        """What ends a turn."""
        return {**super().checkpoint_metadata(), "stop": asdict(self.stop)}

    def export_parts(self, saved: Saved, network: nn.Module, form: Form) -> ExportParts:
        """A generation config that stops where a turn ends."""
        parts = super().export_parts(saved, network, form)
        return replace(parts, generation_config=generation_config(self.tokenizer, self.stop))

    # Responses.

    @property
    def never(self) -> list[int]:
        """Tokens that are never generated."""
        return []

    def request(self, token_ids: Sequence[int], decoding: DecodingConfig) -> Request:
        """What an engine is asked for a prompt; in training, each optimizer step draws anew."""
        step = self.trainer.global_step if self.trainer.state.fn == "fit" else 0
        return Request(token_ids, decoding, self.stop, self.never, step_seed(decoding.seed, step))

    def item_requests(self, items: Sequence[Any], decoding: DecodingConfig) -> list[ItemRequests]:
        """What any engine is asked for items, whose results `finish` turns into responses."""
        return [ItemRequests([self.request(item.input_ids, decoding)], only_response) for item in items]

    def respond(self, items: Sequence[Any], decoding: DecodingConfig) -> list[Response]:
        """What the model, in the state it is in, makes of items; all are answered together."""
        asked = self.item_requests(items, decoding) if items else []
        requests = [request for each in asked for request in each.requests]
        engine = TransformersEngine(self.network, self.tokenizer, len(requests)) if requests else None
        results = iter(engine.generate(requests) if engine else [])
        return [each.finish([next(results) for _ in each.requests]) for each in asked]

    # Predictions.

    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """The decoding configurations by name."""
        return {name: asdict(decoding) for name, decoding in self.generation.items()}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """Responses by name of the decoding configuration, in the order of the batch."""
        return {
            name: [response.prediction() for response in self.respond(batch.items, decoding)]
            for name, decoding in self.generation.items()
        }

    def predict_requests(self, items: Sequence[Any], name: str) -> list[ItemRequests]:
        """What another engine is asked for items, under the decoding configuration of that name."""
        asked = self.item_requests(items, self.generation[name])
        return [replace(each, finish=partial(_prediction, each)) for each in asked]

    def prepare_for_engine(self, saved: Saved | None, folder: Path) -> EngineNeeds:
        """Nothing: an engine generates from token ids."""
        return EngineNeeds()


def only_response(results: list[list[Completion]]) -> Response:
    """The response to an item of one prompt."""
    (completions,) = results
    return Response(completions)


def _prediction(asked: ItemRequests, results: list[list[Completion]]) -> dict[str, Any]:
    response: Response = asked.finish(results)
    return response.prediction()
