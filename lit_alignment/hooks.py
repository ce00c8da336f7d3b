"""What a method declares of itself, so that no callback, tool or engine asks which method runs."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import Metric

from lit_alignment.checkpoints.export import ExportParts
from lit_alignment.checkpoints.hf_folder import Form
from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.asking import Conversation
from lit_alignment.data.rollout import Group
from lit_alignment.errors import ConfigError
from lit_alignment.evaluation.samples import Confusion, NotableResponse, ScoredSample
from lit_alignment.generation.engine import EngineNeeds, ItemRequests, Response
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.dual_encoder import RetrieverConfig
from lit_alignment.models.loading import HeadConfig
from lit_alignment.models.multimodal.modality import MediaShape
from lit_alignment.models.reference import FrozenCopy
from lit_alignment.planning.memory import RolloutShape
from lit_alignment.retrieval.index import IndexConfig
from lit_alignment.retrieval.passage_retriever import PassageRetriever

Stage = Literal["train", "val", "test"]


class MethodHooks:
    """The hooks, with what holds for a method that is a language model and nothing else.

    Attributes:
        head: What scores, where the model is no language model.
        is_causal: Whether the model is a causal one, whose rows are looked at before training.
        shares_batches: Whether ranks can compute one batch together.
        beside: What a method has beside a language model, in words.
        title: The method, in words.
        progress_bar: What of `stage_values` the progress bar shows.
        charts: What of it reports draw, by chart; of training too, where it is logged there.
    """

    head: HeadConfig | None = None
    is_causal = True
    shares_batches = False
    beside = ""
    title = "training"
    progress_bar: tuple[str, ...] = ("loss",)
    charts: tuple[tuple[str, ...], ...] = (("loss",),)

    # Training, validation and test.

    @abstractmethod
    def step(self, batch: Any, stage: Stage) -> Tensor:
        """In training the batch's share of the optimizer step's loss (`step_loss`); else update the stage's metrics.

        Args:
            batch: Of the data module.
            stage: What it is for; `metrics_of(stage)` has the metrics.
        """

    @abstractmethod
    def stage_metrics(self) -> dict[str, Metric]:
        """New metrics of one stage, by name; validation and test have their own."""

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """What is logged at the end of a stage, by name: the values of its metrics, unless a method says more."""
        return {name: metric.compute() for name, metric in self.metrics_of(stage).items()}

    @abstractmethod
    def metrics_of(self, stage: Stage) -> dict[str, Any]:
        """The metrics of a stage, by name."""

    def load_extra_networks(self, device_type: str = "cpu") -> None:
        """Load what a method has beside the language model, after it, and freeze what does not train."""
        return

    def extra_networks(self) -> dict[str, nn.Module]:
        """The loaded networks beside the language model, by what they are called in messages; each is sharded alone."""
        return {}

    @property
    def following_names(self) -> set[str]:
        """Names of frozen weights that follow those which train, so that a checkpoint has to hold them."""
        return set()

    @property
    def frozen_copy(self) -> FrozenCopy:
        """What of the language model a training holds a second time, frozen; for estimates of memory."""
        return "nothing"

    @property
    def rollout_shape(self) -> RolloutShape | None:
        """Responses that a training samples, of a method that does; for estimates of memory."""
        return None

    def trial_rollout(self, number: int) -> list[Group]:
        """Responses to the first prompts of the training data, scored and weighed as for an optimizer step.

        Args:
            number: How many prompts; with 0 the call says only whether the method samples responses in training.

        Raises:
            ConfigError: If it does not.
        """
        raise ConfigError(f"--rollout needs a module that samples responses in training, not {type(self).__name__}.")

    def notable(self) -> list[NotableResponse]:
        """Responses of the last optimizer steps that a report shows."""
        return []

    def export_parts(self, saved: Saved, network: nn.Module, form: Form) -> ExportParts:
        """What the folder of a checkpoint holds besides the language model.

        Args:
            saved: The checkpoint.
            network: The language model that is written, whole on this process.
            form: What was asked for.
        """
        return ExportParts()

    def method_settings(self) -> dict[str, Any]:
        """What a card tells of the method's own settings, as plain values by name."""
        return {}

    def checkpoint_metadata(self) -> dict[str, Any]:
        """What a checkpoint says of the model besides, as plain values."""
        return {}

    def data_arguments(self) -> dict[str, Any]:
        """Arguments of the data module that follow from the model, by name."""
        return {}

    def media_shapes(self) -> dict[str, MediaShape]:
        """How images and sounds enter, by modality."""
        return {}

    @property
    def passage_retriever(self) -> PassageRetriever | None:
        """What retrieves passages, in a method that does."""
        return None

    def respond(
        self, items: Sequence[Any], decoding: DecodingConfig, on_text: Callable[[str], None] | None = None
    ) -> list[Response]:
        """What the model makes of prompts.

        Args:
            items: The prompts; where there are none, the call says only whether the method answers prompts.
            decoding: How to generate.
            on_text: Gets the only response to a single prompt piece by piece.

        Raises:
            ConfigError: If the method answers no prompts.
        """
        raise ConfigError(
            f"CherryPicks needs a module that answers prompts, not {type(self).__name__}; for one that scores use "
            "lit_alignment.ScoredPicks."
        )

    def answers(
        self,
        conversations: Sequence[Conversation],
        decoding: DecodingConfig | None = None,
        batch_size: int = 8,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Response]:
        """What the model answers to conversations, without a Trainer.

        Raises:
            ConfigError: If the method answers no prompts.
        """
        raise ConfigError(f"{type(self).__name__} answers no prompts.")

    def predict_requests(self, items: Sequence[Any], name: str) -> list[ItemRequests]:
        """What another engine than `predict_step` is asked for items.

        Args:
            items: Of the data module.
            name: The file of predictions that is written, of which `finish` makes an item's prediction.

        Raises:
            ConfigError: If other engines have nothing to compute for the method.
        """
        raise ConfigError(f"{type(self).__name__} has nothing for vLLM to compute. Use engine: transformers.")

    def prepare_for_engine(self, saved: Saved | None, folder: Path) -> EngineNeeds:
        """Load what another engine does not run, without a Trainer's strategy, and say what the engine must do.

        Args:
            saved: The trained weights; None before training.
            folder: What the engine loads: a full model, or an adapter.

        Raises:
            ConfigError: If another engine cannot run the method.
        """
        raise ConfigError(f"{type(self).__name__} has nothing for vLLM to compute. Use engine: transformers.")

    def retrieval_config(self) -> tuple[RetrieverConfig, IndexConfig]:
        """The text encoder and the index that the method retrieves from.

        Raises:
            ConfigError: If it retrieves nothing, or the index is not set.
        """
        raise ConfigError(f"{type(self).__name__} has no retriever: give the configuration of a RAGModule.")

    def passage_encoder(self) -> "MethodHooks":
        """A module whose `predict` encodes passages for the index of `retrieval_config`; its network is a DualEncoder.

        Raises:
            ConfigError: If the method retrieves nothing.
        """
        raise ConfigError(f"{type(self).__name__} has no retriever: give the configuration of a RAGModule.")

    def check_scores(self) -> None:
        """Refuse tables of scored records.

        Raises:
            ConfigError: If the method does not score.
        """
        raise ConfigError(
            f"ScoredPicks needs a classifier or a reward model, not {type(self).__name__}; for one that answers "
            "use lit_alignment.CherryPicks."
        )

    def scored_sample(self, item: Any, predicted: dict[str, Any]) -> ScoredSample:
        """What a table of samples shows of a record, and of what `predict_step` says of it; of methods that score."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing.")

    def last_confusion(self) -> Confusion | None:
        """Confusion of the classes in the last validation, where there are classes."""
        return None

    # Predictions.

    @abstractmethod
    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """What decides the predictions of each file that `predict` writes, by the file's name."""

    @abstractmethod
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """For each file, what it says of each item of the batch, in order."""
