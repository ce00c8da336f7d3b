"""What modules share whose model answers prompts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from lit_alignment.checkpoints.export import ExportParts
from lit_alignment.checkpoints.hf_folder import Form
from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.asking import Conversation
from lit_alignment.data.batching.items import PromptBatch
from lit_alignment.data.conversation import ConversationDataModule
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
            encoder = self.data_as(ConversationDataModule).encoder  # type: ignore[type-abstract]
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
        trains = self._trainer is not None and self.trainer.state.fn == "fit"
        step = self.trainer.global_step if trains else 0
        return Request(token_ids, decoding, self.stop, self.never, step_seed(decoding.seed, step))

    def item_requests(self, items: Sequence[Any], decoding: DecodingConfig) -> list[ItemRequests]:
        """What any engine is asked for items, whose results `finish` turns into responses."""
        return [ItemRequests([self.request(item.input_ids, decoding)], only_response) for item in items]

    def respond(
        self, items: Sequence[Any], decoding: DecodingConfig, on_text: Callable[[str], None] | None = None
    ) -> list[Response]:
        """What the model, in the state it is in, makes of items; all are answered together.

        Args:
            items: The prompts.
            decoding: How to generate.
            on_text: Gets the only response to a single prompt piece by piece.
        """
        asked = self.item_requests(items, decoding) if items else []
        requests = [request for each in asked for request in each.requests]
        engine = TransformersEngine(self.network, self.tokenizer, len(requests), on_text=on_text) if requests else None
        results = iter(engine.generate(requests) if engine else [])
        return [each.finish([next(results) for _ in each.requests]) for each in asked]

    # Without a Trainer.

    def chat(
        self,
        conversation: Conversation,
        decoding: DecodingConfig | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The model's response to a conversation, the same as that of `predict`.

        Args:
            conversation: Messages `{role, content}`, the text of a user's message, or a record with `messages`. Its
                last message is to be answered; a response that is there already is left out, as in `predict`.
            decoding: How to generate; by default the first configuration of `generation`, which is greedy.
            on_text: Called with each piece of the response while it is generated, in whole characters.

        Raises:
            ConfigError: If nothing is to be answered, or the conversation fills the model's positions.
            RecordError: If a message is malformed.
        """
        return self.answers([conversation], decoding, on_text=on_text)[0].completions[0].text

    def generate(
        self, conversations: Sequence[Conversation], decoding: DecodingConfig | None = None, batch_size: int = 8
    ) -> list[str]:
        """The model's response to each conversation, in order; arguments are those of `answers`."""
        return [answer.completions[0].text for answer in self.answers(conversations, decoding, batch_size)]

    def answers(
        self,
        conversations: Sequence[Conversation],
        decoding: DecodingConfig | None = None,
        batch_size: int = 8,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Response]:
        """The model's responses with their tokens, log-probabilities where asked for, and why they ended.

        Args:
            conversations: As of `chat`. None of them is shortened.
            decoding: As of `chat`. A response also ends with the model's last position.
            batch_size: Conversations to answer together.
            on_text: As of `chat`, for a single conversation.

        Raises:
            ConfigError: As of `chat`.
            RecordError: As of `chat`.
        """
        decoding, found = decoding or next(iter(self.generation.values())), list[Response]()
        with self.answering():
            items = self.asked(conversations)
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                found += self.respond(batch, self._within_positions(batch, decoding), on_text)
        return found

    def _within_positions(self, items: Sequence[Any], decoding: DecodingConfig) -> DecodingConfig:
        """The same for responses that end with the model's last position."""
        if self.num_positions is None:
            return decoding
        room = self.num_positions - max(len(item.input_ids) for item in items)
        return replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))

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
