"""What every method's LightningModule shares: loading, stages, the loss of a step, optimizer, slim checkpoints."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_alignment.checkpoints.background import start_saving
from lit_alignment.checkpoints.sharded import full
from lit_alignment.data.base import AlignmentDataModule, datamodule_of
from lit_alignment.data.batching.collate import Rows
from lit_alignment.data.batching.standing import (
    total_steps,
)
from lit_alignment.distributed.features import StrategyFeatures, check_backbone, features_of
from lit_alignment.distributed.sharding import Cast
from lit_alignment.errors import ConfigError
from lit_alignment.hooks import Stage
from lit_alignment.metrics.classification import NEEDS
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.attention import check_sequence_parallel
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.head import base_model, check_head, router_weight
from lit_alignment.models.isolation import check_isolation, check_positions
from lit_alignment.models.loading import (
    BackboneConfig,
    load_network,
    load_tokenizer,
    pinned,
    stored_dtype,
    weights_dtype,
)
from lit_alignment.models.roles import roles_of
from lit_alignment.models.router import router_losses
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.standalone import StandaloneModule
from lit_alignment.optimization import OptimizerConfig, algorithm_class, build_optimizer
from lit_alignment.optimizers.resuming import group_settings
from lit_alignment.optimizers.schedule_free import ScheduleFreeAdamW
from lit_alignment.training.non_finite import refuse_or_skip
from lit_alignment.training.precision import keep_inputs
from lit_alignment.training.trainer_settings import check_trainer


class AlignmentModule(StandaloneModule):
    """A language model with a tokenizer, trained in part or whole.

    A method adds `step`, `stage_metrics` and its predictions. What it has beside a language model (further networks,
    what an export holds, what the data module must agree on) it declares by the hooks of `MethodHooks`.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An existing adapter, frozen or to be trained further.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimizer and schedule.
    """

    data_classes: tuple[type[AlignmentDataModule], ...] = (AlignmentDataModule,)

    def __init__(
        self,
        backbone: BackboneConfig,
        peft: PeftConfig | None,
        adapter: AdapterConfig | None,
        tokens: TokensConfig,
        optimizer: OptimizerConfig,
    ) -> None:
        """Load the tokenizer; the weights come in `configure_model`, where the strategy is known."""
        super().__init__()
        if peft is not None and adapter is not None:
            raise ConfigError(
                "model.peft and model.adapter: give new adapters or an existing one, not both. To train new adapters "
                "on top of an existing one, merge that first (lit-alignment merge) and make the result the backbone."
            )
        self.strict_loading = False  # checkpoints hold what was trained; see on_load_checkpoint
        self.peft_config, self.adapter, self.tokens_config, self.optimizer_config = peft, adapter, tokens, optimizer
        self.tokenizer, self.added_tokens = load_tokenizer(backbone, tokens)
        self.backbone = pinned(backbone)  # weights come from the same commit
        self.model: nn.Module | None = None
        self._checked = False
        self.metrics = nn.ModuleDict()  # of each stage but training
        self.undefined: dict[str, str] = {}  # metrics that a stage's records do not define, and what these lack
        self._window_loss: Tensor | float = 0.0
        self._window_router: Tensor | float = 0.0
        self._window: list[tuple[list[str], Tensor]] = []  # ids and loss of each micro-batch of the step
        self._ids: list[str] = []
        self._gathered = ExitStack()

    # Model.

    def setup(self, stage: str) -> None:
        """Make the metrics, once, and look at the Trainer's settings."""
        super().setup(stage)
        keep_inputs(self.trainer)
        if stage == "fit":
            averages = issubclass(algorithm_class(self.optimizer_config), ScheduleFreeAdamW)
            check_trainer(self.trainer, datamodule_of(self.trainer), averages)
        if not self.metrics:
            self.metrics.update({name: nn.ModuleDict(self.stage_metrics()) for name in ("val", "test")})

    def configure_model(self) -> None:
        """Load the weights, once.

        Raises:
            ConfigError: If a training would begin with a model that was loaded to answer.
        """
        if self.trainer.state.fn == "fit":
            self.forget_loaded()
        if self.model is not None:
            return
        self.features.check_run(
            type(self).__name__, str(self.trainer.state.fn), self.shares_batches, self.optimizer_config
        )
        check_backbone(self.features, self.backbone)
        data, device_type = datamodule_of(self.trainer), self.trainer.strategy.root_device.type
        cast = self._cast_after_sharding(device_type)
        model = self.load_model(device_type, data.packing, data.share_prompts, as_stored=cast is not None)
        data.fills_rows = self.backbone.compile and not router_weight(model)  # which counts every token of a row
        if self.sequence is not None:
            config = base_model(model).config
            check_sequence_parallel(config, self.sequence.size, data.packing, config._attn_implementation)
        self.features.shard(model, layered=True, cast=cast)
        self.load_extra_networks(device_type)
        for network in self.extra_networks().values():
            self.features.shard(network, layered=type(network) is type(model))

    @property
    def features(self) -> StrategyFeatures:
        """What the Trainer's strategy says of itself."""
        return features_of(self.trainer.strategy)

    @property
    def sequence(self) -> SequenceGroup | None:
        """The ranks that share each row of training and validation, if any do."""
        return None if self._trainer is None else self.features.sequence

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds shards of the weights only; ZeRO 3 leaves empty ones in their places."""
        return any(isinstance(parameter, DTensor) or parameter.numel() == 0 for parameter in self.parameters())

    def local_tokens(self, batch: Rows) -> slice:
        """The tokens of a batch's rows that this rank computes."""
        return slice(None) if self.sequence is None else self.sequence.own(batch.input_ids.shape[1])

    def _cast_after_sharding(self, device_type: str) -> Cast | None:
        """Precision of the files and of the model, if each process is to read its shards from the files alone."""
        plain = self.backbone.weights == "pretrained" and self.backbone.quantization == "none"
        if not plain or not self.features.supports("sharded_loading"):
            return None
        wrapped = self.peft_config is not None or self.adapter is not None
        stored, wanted = stored_dtype(self.backbone), weights_dtype(self.backbone, wrapped, device_type)
        # Adapters are float32 and have to stay so: then float32 files cannot be told from them.
        if stored is None or (stored == torch.float32 and wanted != stored):
            return None
        return stored, wanted

    def load_model(
        self,
        device_type: str = "cpu",
        packing: bool = False,
        shared_prompts: bool = False,
        as_stored: bool = False,
    ) -> nn.Module:
        """Load the weights, with tokens and adapters, without a Trainer; arguments are those of `load_network`."""
        self.model = load_network(
            self.backbone,
            self.tokenizer,
            head=self.head,
            tokens=self.tokens_config,
            added=self.added_tokens,
            peft=self.peft_config,
            adapter=self.adapter,
            packing=packing,
            shared_prompts=shared_prompts,
            device_type=device_type,
            as_stored=as_stored,
        )
        return self.model

    @property
    def network(self) -> nn.Module:
        """The model.

        Raises:
            ConfigError: Before `configure_model`.
        """
        if self.model is None:
            raise ConfigError("the model is not loaded yet: call configure_model() or run it in a Trainer.")
        return self.model

    def on_fit_start(self) -> None:
        """From now on checkpoints are saved in the background, if that is wanted."""
        super().on_fit_start()
        start_saving(self.trainer)

    # Steps and metrics.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The batch's share of the optimizer step's loss."""
        self._check_network()
        with router_losses() as found:
            loss = self.step(batch, "train")
        share = batch.window_share * world_scale(self) if found or self.has_penalty else 0.0
        if self.has_penalty:
            loss = loss + share * self.adapter_penalty()
        if found and (weight := router_weight(self.network)):
            router_loss = share * torch.stack(found).mean()
            self._window_router = self._window_router + router_loss.detach()
            loss = loss + weight * router_loss
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the batch to the validation metrics."""
        self._check_network()
        self.step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add the batch to the test metrics."""
        self._check_network()
        self.step(batch, "test")

    def _check_network(self) -> None:
        """See, once, that the model does with rows what training takes for granted; under the precision of steps.

        Raises:
            ConfigError: If it does not.
        """
        if not self._checked and self.is_causal:
            data = datamodule_of(self.trainer)
            with torch.compiler.set_stance("force_eager"):  # no step has rows of these few tokens
                check_positions(self.network, data.encoding.max_length)
                check_isolation(self.network, data.packing, data.share_prompts)
                if self.head is None:
                    check_head(self.network, torch.arange(8, device=self.device)[None])
            self._checked = True

    def metrics_of(self, stage: Stage) -> dict[str, Any]:
        """The metrics of a stage, by name."""
        return dict(self.metrics[stage].items())  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_stage("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_stage("test")

    def _log_stage(self, stage: Stage) -> None:
        self.log_values(stage, self.stage_values(stage))
        for metric in self.metrics_of(stage).values():
            metric.reset()

    def log_values(self, stage: Stage, values: Mapping[str, Tensor | float]) -> None:
        """Log values of a stage, and show those that the method wants seen while it trains."""
        if not self.trainer.sanity_checking:  # which sees a few records alone
            values = self._defined(stage, values)
        if stage == "val" and not self.trainer.sanity_checking:
            self.figures = {f"val/{name}": float(value) for name, value in values.items()}
            self._figures_step = self.trainer.global_step
        for name, value in values.items():
            self.log(f"{stage}/{name}", float(value), prog_bar=name in self.progress_bar)

    def _defined(self, stage: Stage, values: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
        """The values but those that the stage's records do not define, each of which is named once."""
        lacking = [name for name, value in values.items() if name in NEEDS and math.isnan(value)]
        for name in lacking:
            if f"{stage}/{name}" not in self.undefined:
                rank_zero_info(f"{stage}/{name} is left out: it needs {NEEDS[name]}.")
        self.undefined |= {f"{stage}/{name}": NEEDS[name] for name in lacking}
        return {name: value for name, value in values.items() if name not in lacking}

    # Loss of an optimizer step.

    def step_loss(self, loss_sum: Tensor, window_weight: float) -> Tensor:
        """The batch's share of the optimizer step's loss, which is a mean over everything that the step trains on.

        Lightning divides by the number of accumulated batches and the strategy by the number of ranks; both are undone,
        so that each token, or each record, counts once whatever batch it stands in.

        Args:
            loss_sum: Weighted sum of the batch's losses, scalar.
            window_weight: Sum of the weights of all micro-batches of the step on all ranks.
        """
        loss = loss_sum * (world_scale(self) / window_weight)
        self._window_loss = self._window_loss + loss.detach()
        self._window.append((self._ids, loss.detach()))
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember which records come, for the message if their loss is non-finite."""
        super().on_train_batch_start(batch, batch_idx)
        self._ids = list(batch.ids)

    # Optimizer.

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of the trainable parameters, with the schedule stepped at each optimizer step."""
        fused = self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda")
        steps = partial(total_steps, self.trainer)
        roles = replace(roles_of(self.network), other_rates=self.other_rates())
        optimizer, schedule = build_optimizer(self.named_parameters(), self.optimizer_config, steps, fused, roles)
        self.settings = group_settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def algorithm(self) -> str:
        """Name of the optimizer's class."""
        return algorithm_class(self.optimizer_config).__name__

    def other_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parts of the model with a highest learning rate of their own."""
        return []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss of the whole optimizer step, and the gradient norm before clipping.

        Raises:
            TrainingError: If that is non-finite, and `optimizer.non_finite` says to stop.
        """
        mean = self._window_loss / self.trainer.accumulate_grad_batches
        self.log("train/loss", mean, prog_bar=True, sync_dist=True)
        if isinstance(self._window_router, Tensor):
            self.log("train/router_loss", self._window_router / self.trainer.accumulate_grad_batches, sync_dist=True)
        self._window_loss = self._window_router = 0.0
        window, self._window = self._window, []
        if self.features.supports("gradients"):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm = full(torch.nn.utils.get_total_norm(gradients))
            self.log("train/grad_norm", norm)
        else:  # the strategy tells the norm later; a loss that is finite on all ranks has to do
            norm = self.trainer.strategy.reduce(torch.as_tensor(mean), reduce_op="sum")
        # Gradients are summed over all ranks, so all see the same norm. The scaler of fp16 skips such steps itself.
        if self.trainer.precision != "16-mixed" and not bool(torch.isfinite(norm)):
            refuse_or_skip(self, self.optimizer_config.non_finite, window)
        super().on_before_optimizer_step(optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the gradient norm, where the strategy has the gradients.

        Raises:
            TrainingError: If it is non-finite.
        """
        super().on_train_batch_end(outputs, batch, batch_idx)
        norm = self.features.gradient_norm()
        if norm is not None:
            self.log("train/grad_norm", norm)
            if not math.isfinite(norm):
                refuse_or_skip(self, self.optimizer_config.non_finite, [])

    # Predictions.

    def on_predict_start(self) -> None:
        """Gather what is sharded: ranks with unequal numbers of batches or tokens would wait for each other."""
        self._gathered.enter_context(self.features.gathered(self))

    def on_predict_end(self) -> None:
        """Shard again what was gathered."""
        self._gathered.close()


def world_scale(module: AlignmentModule) -> float:
    """What undoes the averaging over ranks and over accumulated batches that strategies and Lightning do."""
    different = module.trainer.world_size // module.features.identical_ranks
    return float(different * module.trainer.accumulate_grad_batches)


def alignment_module(module: LightningModule) -> AlignmentModule:
    """A Trainer's module as one of ours.

    Raises:
        ConfigError: If it is another.
    """
    if not isinstance(module, AlignmentModule):
        raise ConfigError(f"a module of lit_alignment is needed here, not {type(module).__name__}.")
    return module
