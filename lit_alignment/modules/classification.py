"""Classification of conversations: one class, several, or numbers.

N conversations, K labels
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor
from torchmetrics import Metric

from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.asking import Conversation
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.batching.collate import ScoreBatch
from lit_alignment.data.classification import ClassificationDataModule
from lit_alignment.data.encoding.prompts import PromptItem
from lit_alignment.data.labels import class_index
from lit_alignment.errors import ConfigError, present
from lit_alignment.evaluation.samples import Confusion, ScoredSample
from lit_alignment.hooks import Stage
from lit_alignment.losses import balanced_class_weights, focal_loss, multi_label_loss, regression_loss
from lit_alignment.metrics import TokenMean
from lit_alignment.metrics.classification import (
    ScoresAndTargets,
    best_temperature,
    confusion_matrix,
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig, HeadConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.scoring import ScoringModule, check_positive, existing_head
from lit_alignment.optimization import OptimizerConfig


class ClassificationModule(ScoringModule):
    """A decoder that classifies conversations by the hidden state of their last token.

    loss of an optimizer step = mean over all its conversations, on all ranks and in all micro-batches

    Args:
        backbone: The pretrained model; an exported classifier brings its labels.
        labels: Names of the classes, or of the quantities of a regression, in the order of the scores. Records may
            give names or numbers. None takes those of an exported classifier.
        problem: One class a conversation, any number of labels, or numbers.
        peft: New adapters from the peft library, beside which the head trains; without these and `adapter` all train.
        adapter: An existing adapter, frozen or to be trained further, with its head.
        tokens: Special and new tokens.
        optimizer: Optimizer and schedule.
        class_weights: Weight of each class in the loss, or `balanced`: as much for rare classes as for common ones.
        focal_gamma: How strongly conversations that the model is sure of are down-weighted; 0 is plain cross-entropy.
        label_smoothing: Probability spread evenly over the labels, in training only.
    """

    title = "classification"
    data_classes = (ClassificationDataModule,)

    def __init__(
        self,
        backbone: BackboneConfig,
        labels: list[str] | None = None,
        problem: Literal["single_label", "multi_label", "regression"] = "single_label",
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        class_weights: list[float] | Literal["balanced"] | None = None,
        focal_gamma: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        """Check the labels; the weights come in `configure_model`."""
        head = classification_head(backbone, adapter, labels, problem)
        super().__init__(backbone, peft, adapter, tokens, optimizer, head)
        check_positive("focal_gamma", focal_gamma)
        check_positive("label_smoothing", label_smoothing)
        if isinstance(class_weights, list) and len(class_weights) != len(head.labels):
            raise ConfigError(f"model.class_weights has {len(class_weights)} numbers for {len(head.labels)} labels.")
        if head.problem != "single_label" and focal_gamma:
            raise ConfigError("model.focal_gamma: the focal loss is for problem: single_label. Set it to 0.")
        if head.problem == "regression" and (class_weights is not None or label_smoothing):
            raise ConfigError("model.class_weights and model.label_smoothing are for classes, not for a regression.")
        self.labels, self.problem = list(head.labels), head.problem
        self.class_weights, self.focal_gamma, self.label_smoothing = class_weights, focal_gamma, label_smoothing
        self.confusion: Tensor | None = None  # of the last validation or test
        self._alpha: Tensor | None
        self.register_buffer("_alpha", None, persistent=False)

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """Also the labels."""
        head = present(saved.head, "a head of scores")
        return {**super().arguments_of(saved), "labels": list(head.labels), "problem": head.problem}

    def data_arguments(self) -> dict[str, Any]:
        """Labels, and what they are of."""
        return {"labels": self.labels, "problem": self.problem}

    def on_fit_start(self) -> None:
        """Count the classes, if their weights are to balance them."""
        super().on_fit_start()
        self._weights()

    def _weights(self) -> Tensor | None:
        if self._alpha is None and self.class_weights is not None:
            if self.class_weights == "balanced":
                data = datamodule_of(self.trainer)
                if not isinstance(data, ClassificationDataModule) or "train" not in data.examples:
                    return None  # a validation alone, whose loss stays unweighted
                self._alpha = balanced_class_weights(data.class_counts()).to(self.device)
            else:
                self._alpha = torch.tensor(self.class_weights, device=self.device)
        return self._alpha

    def losses(self, logits: Tensor, targets: Tensor, training: bool = True) -> Tensor:
        """Loss of each conversation, [N]; without label smoothing outside of training."""
        smoothing = self.label_smoothing if training else 0.0
        match self.problem:
            case "single_label":
                return focal_loss(logits, targets, self.focal_gamma, self._weights(), smoothing)
            case "multi_label":
                return multi_label_loss(logits, targets, self._weights(), smoothing)
            case "regression":
                return regression_loss(logits, targets)

    def stage_metrics(self) -> dict[str, Metric]:
        """The mean loss, and all scores, of which the other metrics are computed."""
        return {"loss": TokenMean(), "scored": ScoresAndTargets(len(self.labels))}

    def scored_step(self, scores: Tensor, batch: ScoreBatch, stage: Stage) -> Tensor:
        """The batch's share of the loss in training; else its loss, after adding it to the metrics."""
        loss_sum = (self.losses(scores, batch.targets, stage == "train") * batch.weights).sum()
        if stage == "train":
            return self.step_loss(loss_sum, batch.window_weight)
        counted = batch.weights > 0
        metrics = self.metrics_of(stage)
        metrics["loss"].update(loss_sum, batch.weights.sum())
        metrics["scored"].update(scores[counted], batch.targets[counted])
        return loss_sum

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """Metrics of the scores; a validation keeps the temperature that calibrates the probabilities.

        `calibration_error_scaled` is of the probabilities at that temperature, which predict gives.
        """
        metrics = self.metrics_of(stage)
        logits, targets = metrics["scored"].gathered()
        values: dict[str, Tensor | float] = {"loss": metrics["loss"].compute()}
        if self.problem == "regression":
            return values | regression_metrics(logits, targets)
        measured = single_label_metrics if self.problem == "single_label" else multi_label_metrics
        if self.problem == "single_label":
            self.confusion = confusion_matrix(logits, targets)
        if stage == "val":
            self.measure({"calibration_temperature": best_temperature(logits, targets)})
        scaled = measured(logits / self.temperature, targets)["calibration_error"]
        values |= measured(logits, targets)
        return values | {"calibration_error_scaled": scaled, "temperature": self.temperature}

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities; 1 before the first validation."""
        return self.head.measured.get("calibration_temperature", 1.0)

    # Predictions.

    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """One file, `classes`."""
        return {"classes": {"temperature": self.temperature}}

    def sequences(self, item: PromptItem) -> list[list[int]]:
        """The conversation."""
        return [item.input_ids]

    def predicted(self, item: PromptItem, scores: Tensor) -> dict[str, Any]:
        """`prediction` and `probabilities` of one conversation; a regression has the prediction only."""
        logits = scores[0]
        match self.problem:
            case "single_label":
                probabilities = (logits / self.temperature).softmax(-1).tolist()
                prediction: Any = self.labels[int(logits.argmax())]
            case "multi_label":
                probabilities = (logits / self.temperature).sigmoid().tolist()
                prediction = [name for name, logit in zip(self.labels, logits.tolist(), strict=True) if logit > 0]
            case "regression":
                values = logits.tolist()
                return {"prediction": values[0] if len(values) == 1 else values}
        return {"prediction": prediction, "probabilities": dict(zip(self.labels, probabilities, strict=True))}

    def classify(self, conversations: Sequence[Conversation], batch_size: int = 8) -> list[dict[str, Any]]:
        """The class of each text or conversation, in order, as `predict` gives it.

        Args:
            conversations: Texts, lists of messages, or records with `messages`; none of them is shortened.
            batch_size: Conversations to classify together.

        Returns:
            `prediction`, a label, a list of labels (`multi_label`) or numbers (`regression`), and but for numbers
            `probabilities` by label, calibrated where a validation has measured the temperature.

        Raises:
            ConfigError: If one has more tokens than the model has positions.
            RecordError: If one is malformed.
        """
        return self.predictions(conversations, batch_size)

    def scored_sample(self, item: PromptItem, predicted: dict[str, Any]) -> ScoredSample:
        """The predicted classes with their probabilities, or numbers."""
        given = predicted["prediction"]
        prediction = given if isinstance(given, list) else [given]
        probabilities = predicted.get("probabilities", {})
        shown = [(name, probabilities.get(name)) for name in prediction]
        text = "\n".join(f"{name:.3g}" if p is None else f"{name} {p:.1%}" for name, p in shown)
        if item.label is None or self.problem == "regression":
            return ScoredSample(text, {"prediction": text})
        names = self.names(item.label)
        one = names[0] if names and self.problem == "single_label" else None
        scores = {} if one is None else {"probability of the label": probabilities[one]}
        return ScoredSample(text, {"prediction": text}, scores, names == prediction)

    def last_confusion(self) -> Confusion | None:
        """That of the classes, for a single label."""
        return None if self.confusion is None else Confusion(self.confusion.tolist(), self.labels)

    def names(self, label: Any) -> list[str]:
        """A record's label, a name or number or a list of these, as names in the order of the labels."""
        found = {class_index(each, self.labels) for each in (label if isinstance(label, list) else [label])}
        return [name for index, name in enumerate(self.labels) if index in found]


def classification_head(
    backbone: BackboneConfig,
    adapter: AdapterConfig | None,
    labels: list[str] | None,
    problem: Literal["single_label", "multi_label", "regression"],
) -> HeadConfig:
    """The head with the given labels, or with those of an exported classifier.

    Raises:
        ConfigError: If there are none, too few, or the same twice.
    """
    existing = existing_head(backbone, adapter)
    if labels is None:
        if existing is None:
            raise ConfigError(
                f"model.labels is missing: {backbone.path} is no folder of a classifier, which would have its own."
            )
        return existing
    if len(set(labels)) != len(labels) or len(labels) < (2 if problem == "single_label" else 1):
        least = "two or more" if problem == "single_label" else "one or more"
        raise ConfigError(f"model.labels is {labels}: give {least}, all different.")
    same = existing is not None and existing.labels == tuple(labels) and existing.problem == problem
    return existing if same and existing is not None else HeadConfig(tuple(labels), problem)
