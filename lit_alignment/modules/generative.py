"""What modules share whose model answers prompts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import PeftConfig

from lit_alignment.data.batching.items import PromptBatch
from lit_alignment.data.conversation import conversations_of
from lit_alignment.generation.settings import Answer, DecodingConfig
from lit_alignment.generation.transformers_engine import StopRule, generate, stop_rule
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.optimization import OptimizerConfig


@dataclass
class Question:
    """What is to be generated for one item.

    Args:
        prompts: Token ids of each prompt.
        settings: How to answer them.
        finish: Makes the response of the answers to each prompt.
    """

    prompts: list[list[int]]
    settings: DecodingConfig
    finish: Callable[[list[list[Answer]]], "Response"]


@dataclass
class Response:
    """What a model makes of one prompt.

    Args:
        answers: Its answers.
        found: What it has looked up for them, as it stands in the predictions.
    """

    answers: list[Answer]
    found: dict[str, Any] = field(default_factory=dict)


class GenerativeModule(AlignmentModule):
    """A language model that answers prompts in `predict` and in cherry picks.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An adapter that exists, frozen or to go on with.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimiser and schedule.
        generation: Named ways to answer in `predict`; each writes a file of its own.
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
            self._stop = stop_rule(self.tokenizer, conversations_of(self.trainer).encoder.end_of_turn())
        return self._stop

    def about(self) -> dict[str, Any]:
        """Also what ends a turn."""
        return {"stop": asdict(self.stop)}

    def answer(self, prompts: list[list[int]], settings: DecodingConfig) -> list[list[Answer]]:
        """Answers to prompts, given as token ids."""
        return generate(self.network, self.tokenizer, prompts, settings, self.stop, never=self.never)

    @property
    def never(self) -> list[int]:
        """Tokens that are never generated."""
        return []

    def questions(self, items: Sequence[Any], settings: DecodingConfig) -> list[Question]:
        """What has to be generated for items, by any engine."""
        return [Question([item.input_ids], settings, lambda answers: Response(answers[0])) for item in items]

    def respond(self, items: Sequence[Any], settings: DecodingConfig) -> list[Response]:
        """What the model makes of items."""
        questions = self.questions(items, settings)
        prompts = [prompt for question in questions for prompt in question.prompts]
        answers = iter(self.answer(prompts, questions[0].settings))
        return [question.finish([next(answers) for _ in question.prompts]) for question in questions]

    def prediction(self, response: Response) -> dict[str, Any]:
        """What the predictions say of an item."""
        return {"answers": [answer.to_dict() for answer in response.answers], **response.found}

    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """The generation settings by name."""
        return {name: asdict(settings) for name, settings in self.generation.items()}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """Answers by name of the generation settings, in the order of the batch."""
        return {
            name: [self.prediction(response) for response in self.respond(batch.items, settings)]
            for name, settings in self.generation.items()
        }
