"""Preference optimisation: DPO and its family on pairs, KTO on responses judged alone.

N trained tokens, S responses, P pairs
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig
from torch import Tensor
from torchmetrics import Metric

from lit_alignment.data.base import Split, datamodule_as
from lit_alignment.data.preference import PreferenceBatch, PreferenceDataModule
from lit_alignment.data.sources.record_batches import CachedRows
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.hooks import Stage
from lit_alignment.losses.pairs import pair_loss, pairs_of, response_loss, responses_of, rewards
from lit_alignment.losses.preference_config import LossConfig
from lit_alignment.metrics.named import NamedMeans
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.logprobs import target_logps
from lit_alignment.models.reference import ReferenceSyncConfig, quiet_logps
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.compared import ComparedModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.training.preference_checks import (
    check_balance,
    check_chats,
    check_margins,
    check_streamed_losses,
    what_to_say,
)
from lit_alignment.training.preference_reference import ReferenceKind, reference_of
from lit_alignment.training.preference_values import (
    SIDES,
    k3_estimate,
    logged_means,
    pair_values,
    response_values,
    value_names,
)
from lit_alignment.training.reference_pass import cached_reference, made_of


class PreferenceModule(ComparedModule):
    """A causal language model that learns which responses are preferred.

    loss of an optimizer step = sum over losses of weight * mean over all its pairs, on all ranks and in all
    micro-batches. Log-probabilities are summed over the assistant's tokens of a response; dropout is off. With
    `data.chats` there is added chat_weight * the mean loss of all trained tokens of the step's chats.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An existing adapter, frozen or to be trained further.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimizer and schedule.
        losses: What is minimised; DPO by default.
        reference: What the policy is compared with, the model before training: `adapter_off` switches new adapters off,
            `frozen_copy` holds a second copy of a continued adapter or, where all weights train, of the model, `cached`
            computes its log-probabilities before training, once, and keeps them in the data cache. `auto` takes what
            costs least: new adapters off, a copy of a continued adapter, a cache where all weights train.
        reference_sync: Let the reference follow the policy (TR-DPO); it is a frozen copy then.
        chat_weight: Of the chats' loss, beside the weights of `losses`.
        generation: Decoding configurations of `predict`, by name.
    """

    title = "preference optimisation"
    data_classes = (PreferenceDataModule,)
    shares_batches = True
    progress_bar = ("loss", "accuracy", "margin")
    charts = (
        ("loss",),
        ("chat_loss",),
        ("accuracy",),
        ("margin",),
        *((f"{better}_reward", f"{worse}_reward") for better, worse in SIDES),
        *((f"{better}_logp", f"{worse}_logp") for better, worse in SIDES),
        *((f"{better}_length", f"{worse}_length") for better, worse in SIDES),
        ("kl",),
    )

    def __init__(
        self,
        backbone: BackboneConfig,
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        losses: list[LossConfig] | None = None,
        reference: ReferenceKind = "auto",
        reference_sync: ReferenceSyncConfig | None = None,
        chat_weight: float = 1.0,
        generation: dict[str, DecodingConfig] | None = None,
    ) -> None:
        """Check the losses and the reference; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        self.losses, self.chat_weight = losses or [LossConfig("sigmoid")], chat_weight
        self.reference = reference_of(reference, self.losses, peft, adapter, reference_sync is not None)
        self.reference_sync, self.reference_model = reference_sync, None
        self.of_responses = self.losses[0].form.of == "responses"
        self.loss_names = [f"{loss.name}_loss" for loss in self.losses] if len(self.losses) > 1 else []
        self.train_means = NamedMeans([*value_names(self.of_responses), *self.loss_names])
        self._first: dict[str, float] = {}  # values of the first validation
        self._said: set[str] = set()
        # z of the optimizer step; that of a validation, which may come in the middle of one, is kept apart.
        self._baselines: dict[Stage, Tensor] = {stage: torch.zeros(2) for stage in ("train", "val", "test")}

    def method_settings(self) -> dict[str, Any]:
        """Losses, and what the policy is compared with."""
        return {"losses": ", ".join(loss.name for loss in self.losses), "reference": self.reference}

    # Model and reference.

    def judged_logps(self, batch: PreferenceBatch) -> Tensor | None:
        """Log-probability of each target of a response under the reference, [N]."""
        found = self.reference_logps(batch, batch.reference)
        return None if found is None else found[: batch.num_judged]

    def _cached(self, split: Split) -> CachedRows:
        """Log-probabilities of a split's targets under the model before training."""
        drawn = self.backbone.weights == "random" or bool(self.added_tokens)
        frozen = None if self.adapter is None else replace(self.adapter, trainable=False)
        weights = made_of(self.backbone, frozen, self._random_state if drawn else None, self.data.cache_dir)
        return cached_reference(
            self.trainer, self.data, split, weights, base_model(self.network), partial(self.before_training, frozen)
        )

    def on_fit_start(self) -> None:
        """Say how good and bad responses are balanced."""
        super().on_fit_start()
        self._first, self._said = {}, set()
        if self.of_responses and "train" in self.data.examples:
            check_balance(self.data.examples["train"], self.losses[0])

    # Steps and metrics.

    def setup(self, stage: str) -> None:
        """Refuse data of another kind than the losses are of, and say what KL estimates are taken over."""
        super().setup(stage)
        if stage == "predict":
            return
        if stage == "fit":
            check_chats(self.chat_weight, self.data.chats)
        if stage == "fit" and self.data.stream is not None:
            check_streamed_losses(self.losses, self.reference)
        wanted = "outcomes" if self.of_responses else "preferences"
        if self.data.kind != wanted:
            raise ConfigError(
                f"model.losses: {self.losses[0].name} is a loss of {self.losses[0].form.of}, and data.kind is "
                f"{self.data.kind}. Set data.kind to {wanted}, or choose another loss."
            )
        if not self.of_responses:
            check_margins(self.data.examples, self.losses)
        self.data.compute_reference = self._cached if self.reference == "cached" else None
        self.data.baseline = next((loss.form.baseline for loss in self.losses if loss.form.baseline), None)
        if self.data.baseline is not None and self.features.sequence is not None:
            raise ConfigError(
                f"model.losses: {self.losses[0].name} cannot share rows between ranks. Use another strategy."
            )

    @property
    def data(self) -> PreferenceDataModule:
        """The data module.

        Raises:
            ConfigError: If it is another method's.
        """
        return datamodule_as(PreferenceDataModule, self.trainer)

    def stage_metrics(self) -> dict[str, Metric]:
        """Means over pairs or responses."""
        return {"means": NamedMeans([*value_names(self.of_responses), *self.loss_names])}

    def step(self, batch: PreferenceBatch, stage: Stage) -> Tensor:
        """The batch's share of the loss in training; else its loss, after adding it to the metrics."""
        if stage == "train" and batch.baseline:
            self._baselines[stage] = self._estimate(batch.baseline)
        reference = self.judged_logps(batch)
        policy, chats = target_logps(self.network, batch, sequence=self.sequence).tensor_split([batch.num_judged])
        weights = batch.weights[batch.num_judged :]
        if self.of_responses:
            responses = responses_of(policy, reference, batch.lengths, batch.counts)
            desirable = batch.scores > 0
            parts = [response_loss(loss, responses, desirable, self._baselines[stage][0]) for loss in self.losses]
            sides = batch.desirable, batch.undesirable
            values = response_values(rewards(self.losses, responses), responses, *sides)
        else:
            given = batch.chosen, batch.rejected, batch.margins, self._baselines[stage]
            pairs = pairs_of(policy, reference, batch.lengths, batch.counts, *given)
            parts = [pair_loss(loss, pairs) for loss in self.losses]
            values = pair_values(rewards(self.losses, pairs.chosen), rewards(self.losses, pairs.rejected), pairs)
        losses = torch.stack([loss.weight * part for loss, part in zip(self.losses, parts, strict=True)]).sum(0)  # [B]
        if not batch.dummy:
            if reference is not None:
                values["kl"] = k3_estimate(policy, reference, batch.lengths)
            values |= {"loss": losses, **dict(zip(self.loss_names, parts, strict=False))}
            metric = self.train_means if stage == "train" else self.metrics_of(stage)["means"]
            metric.update(values)
            metric.update({"chat_loss": -chats}, weights)
        # Ranks that share a row all have the whole loss, of which one counts.
        counts = float(not batch.dummy and (self.sequence is None or self.sequence.rank == 0))
        if stage != "train":
            return counts * losses.sum()
        # Two means, each over its own number in the step; of what a step does not have, the sum is 0.
        loss = losses.sum() / (batch.window_weight or 1.0)
        chat_loss = -(weights * chats).sum() / (batch.window_chat_tokens or 1.0)
        return self.step_loss(counts * (loss + self.chat_weight * chat_loss), 1.0)

    def _estimate(self, batches: Iterable[PreferenceBatch]) -> Tensor:
        """Z of the chosen and of the rejected responses, or of mismatched ones: mean log-ratio on all ranks, [2].

        Args:
            batches: What it is taken over, of which each rank has as many.
        """
        totals = torch.zeros(2, 2, dtype=torch.float64, device=self.device)  # of each side the sum and the number
        for batch in batches:
            reference = self.judged_logps(batch)
            policy = quiet_logps(self.network, batch, self.sequence)[: batch.num_judged]
            ratios = responses_of(policy, reference, batch.lengths, batch.counts).ratio.double()
            sides = [ratios] if self.of_responses else [ratios[batch.chosen], ratios[batch.rejected]]
            for side, own in enumerate([] if batch.dummy else sides):
                totals[side, 0] += own.sum()
                totals[side, 1] += own.numel()
        totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        return (totals[:, 0] / totals[:, 1].clamp_min(1)).clamp_min(0).float()

    def _estimate_on(self, stage: Stage, loaders: Any, numbers: list[Any]) -> None:
        """The same over all that a validation or test sees, before it begins."""
        if self.data.baseline is None:
            return
        batches = (batch for whole in islice(loaders, numbers[0]) for batch in whole.baseline)
        strategy = self.trainer.strategy
        with self.trainer.precision_plugin.forward_context():
            self._baselines[stage] = self._estimate(strategy.batch_to_device(batch) for batch in batches)

    def on_validation_epoch_start(self) -> None:
        """Take the KL estimate over all of the validation."""
        trainer = self.trainer
        numbers = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._estimate_on("val", trainer.val_dataloaders, numbers)

    def on_test_epoch_start(self) -> None:
        """Take the KL estimate over all of the test."""
        self._estimate_on("test", self.trainer.test_dataloaders, self.trainer.num_test_batches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log means over all pairs or responses, of all ranks, since the last time."""
        super().on_before_optimizer_step(optimizer)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = logged_means(self.train_means.compute())
            self.log_values("train", {name: value for name, value in values.items() if name != "loss"})
            self.train_means.reset()

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """Means over pairs or responses, and how margins go with lengths."""
        values = logged_means(self.metrics_of(stage)["means"].compute())
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and not self.of_responses:
            now = {name: float(value) for name, value in values.items()}
            self._first = self._first or now
            for text in what_to_say(self._first, now, len(self.data.examples["val"]), self._said):
                rank_zero_warn(text)
        return dict(values)
