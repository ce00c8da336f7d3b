"""What every method's LightningModule shares: loading, adapters, the loss of a step, optimiser, slim checkpoints."""

import math
import warnings
from abc import abstractmethod
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig
from torch import Tensor, nn

from lit_alignment.checkpoints.background import start_saving
from lit_alignment.checkpoints.restore import CHECKPOINT_KEY, refuse_missing, trained_names
from lit_alignment.checkpoints.sharded import full
from lit_alignment.data.base import data_rank, datamodule_of
from lit_alignment.data.batching.collate import Rows
from lit_alignment.distributed.deepspeed import DeepSpeedStrategy
from lit_alignment.distributed.fsdp2 import FSDP2Strategy
from lit_alignment.distributed.sharding import Cast
from lit_alignment.errors import ConfigError, TrainingError
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.attention import check_sequence_parallel
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import (
    BackboneConfig,
    HeadConfig,
    load_network,
    load_tokenizer,
    stored_dtype,
    weights_dtype,
)
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.optimization import OptimizerConfig, build_optimizer


class AlignmentModule(LightningModule):
    """A language model with a tokenizer, trained in part or whole.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An adapter that exists, frozen or to go on with.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimiser and schedule.
    """

    head: HeadConfig | None = None  # what scores, where the model is no language model
    shares_batches = False  # whether ranks can compute one batch together

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
        self.backbone, self.peft_config, self.adapter, self.tokens_config = backbone, peft, adapter, tokens
        self.optimizer_config = optimizer
        self.tokenizer, self.added_tokens = load_tokenizer(backbone, tokens)
        self.model: nn.Module | None = None
        self._window_loss: Tensor | float = 0.0
        self._window: list[tuple[list[str], Tensor]] = []  # ids and loss of each micro-batch of the step
        self._ids: list[str] = []

    # Model.

    def configure_model(self) -> None:
        """Load the weights, once."""
        if self.model is None:
            self._check_strategy()
            data, device_type = datamodule_of(self.trainer), self.trainer.strategy.root_device.type
            cast = self._cast_after_sharding(device_type)
            model = self.load_model(device_type, data.packing, data.share_prompts, as_stored=cast is not None)
            if self.sequence is not None:
                config = base_model(model).config
                check_sequence_parallel(config, self.sequence.size, data.packing, config._attn_implementation)
            self.shard(model, layered=True, cast=cast)

    def _check_strategy(self) -> None:
        """Refuse what a strategy cannot do, before anything is loaded.

        Raises:
            ConfigError: Naming the setting.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            for name in ("sequence_parallel_size", "tensor_parallel_size"):
                if getattr(strategy, name) > 1 and not self.shares_batches:
                    raise ConfigError(f"trainer.strategy.{name}: not for {type(self).__name__} yet. Set it to 1.")
            if strategy.tensor_parallel_size > 1 and self.trainer.state.fn == "predict":
                raise ConfigError("trainer.strategy.tensor_parallel_size: not for predict. Set it to 1.")
        elif isinstance(strategy, DeepSpeedStrategy):
            if self.optimizer_config.non_finite == "skip":
                raise ConfigError("optimizer.non_finite: DeepSpeed's engine cannot skip a step. Set it to stop.")
        elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy | LightningDeepSpeedStrategy):
            ours = "DeepSpeedStrategy" if isinstance(strategy, LightningDeepSpeedStrategy) else "FSDP2Strategy"
            raise ConfigError(f"trainer.strategy: use lit_alignment.{ours} in place of {type(strategy).__name__}.")

    @property
    def sequence(self) -> SequenceGroup | None:
        """The ranks that share each row of training and validation, if any do."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy.sequence if isinstance(strategy, FSDP2Strategy) else None

    def own_tokens(self, batch: Rows) -> slice:
        """The tokens of a batch's rows that are this rank's."""
        return slice(None) if self.sequence is None else self.sequence.own(batch.input_ids.shape[1])

    def _cast_after_sharding(self, device_type: str) -> Cast | None:
        """Precision of the files and of the model, if each process is to read its shards from the files alone."""
        sharded = isinstance(self.trainer.strategy, FSDP2Strategy)
        if not sharded or self.backbone.weights != "pretrained" or self.backbone.quantization != "none":
            return None
        wrapped = self.peft_config is not None or self.adapter is not None
        stored, wanted = stored_dtype(self.backbone), weights_dtype(self.backbone, wrapped, device_type)
        # Adapters are float32 and have to stay so: then float32 files cannot be told from them.
        if stored is None or (stored == torch.float32 and wanted != stored):
            return None
        return stored, wanted

    def shard(self, part: nn.Module, layered: bool = False, cast: Cast | None = None) -> None:
        """Split a part of the model over devices, if the strategy does that.

        Args:
            part: The part.
            layered: Whether it is a language model, to be split layer by layer.
            cast: Precision of its files, and of the model, if these differ.
        """
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            self.trainer.strategy.shard(part, layered, cast)

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
        start_saving(self.trainer)

    # Loss of an optimiser step.

    def step_loss(self, loss_sum: Tensor, window_weight: float) -> Tensor:
        """The batch's share of the optimiser step's loss, which is a mean over everything that the step trains on.

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
        """Remember which records come, for the message if their loss is no number."""
        self._ids = list(batch.ids)

    # Optimiser.

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters, with the schedule stepped at each optimiser step."""
        total_steps = float(self.trainer.estimated_stepping_batches)
        fused = self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda")
        rates = self.other_rates()
        optimizer, schedule = build_optimizer(self.parameters(), self.optimizer_config, total_steps, fused, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def other_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parts of the model with a highest learning rate of their own."""
        return []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss of the whole optimiser step, and the gradient norm before clipping.

        Raises:
            TrainingError: If that is no number, and `optimizer.non_finite` says to stop.
        """
        mean = self._window_loss / self.trainer.accumulate_grad_batches
        self.log("train/loss", mean, prog_bar=True, sync_dist=True)
        self._window_loss = 0.0
        window, self._window = self._window, []
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # its engine has the gradients, and their norm later
            norm = self.trainer.strategy.reduce(torch.as_tensor(mean), reduce_op="sum")
        else:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm = full(torch.nn.utils.get_total_norm(gradients))
            self.log("train/grad_norm", norm)
        # Gradients are summed over all ranks, so all see the same norm. The scaler of fp16 skips such steps itself.
        if self.trainer.precision != "16-mixed" and not bool(torch.isfinite(norm)):
            self._not_finite(window)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the gradient norm, where an engine has the gradients.

        Raises:
            TrainingError: If it is no number.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and (norm := strategy.gradient_norm()) is not None:
            self.log("train/grad_norm", norm)
            if not math.isfinite(norm):
                self._not_finite([])

    def _not_finite(self, window: list[tuple[list[str], Tensor]]) -> None:
        """Stop, or leave the weights as they are, saying which records did it."""
        bad = [ids for ids, loss in window if not bool(torch.isfinite(loss))]
        which = (
            ", ".join(name for ids in bad for name in ids) or "none by itself on this rank; the gradient is not finite"
        )
        step = self.trainer.global_step
        if self.optimizer_config.non_finite == "stop":
            raise TrainingError(
                f"the loss of optimizer step {step} is not a number. Micro-batches at fault: {which}. Lower "
                "optimizer.learning_rate or mend the records, and go on from a checkpoint; or set "
                "optimizer.non_finite: skip."
            )
        warnings.warn(f"optimizer step {step} is skipped, its loss is not a number: {which}", stacklevel=2)
        for parameter in self.parameters():
            parameter.grad = None

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights only, and write down what they belong to, as plain values."""
        trained = trained_names(self)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint[CHECKPOINT_KEY] = {
            "module": f"{type(self).__module__}.{type(self).__qualname__}",
            "backbone": asdict(self.backbone),
            "peft": None if self.peft_config is None else _plain(self.peft_config.to_dict()),
            "adapter": None if self.adapter is None else asdict(self.adapter),
            "tokens": asdict(self.tokens_config),
            "chat_template": datamodule_of(self.trainer).chat_template(),
            "ranks": data_rank(self.trainer)[1],
            **self.about(),
        }

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of the model besides, as plain values."""
        return {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks a trained weight: non-strict loading would leave it at its start value."""
        refuse_missing(trained_names(self), checkpoint["state_dict"], "Check model.peft and model.backbone.")
        ranks = checkpoint.get(CHECKPOINT_KEY, {}).get("ranks")
        if ranks is not None and "loops" in checkpoint and self._trainer is not None:
            _recount(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], ranks / data_rank(self.trainer)[1])

    # Predictions.

    @abstractmethod
    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """What decides the predictions of each file that `predict` writes, by the file's name."""

    @abstractmethod
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """For each file, what it says of each item of the batch, in order."""


def _recount(progress: dict[str, Any], factor: float) -> None:
    """Make the number of batches that each process has seen that of another number of processes.

    A checkpoint can be saved before its last batch counts as completed, which stays so.
    """
    for counts in (progress["total"], progress["current"]):
        open_ones = counts["processed"] - counts["completed"]
        for name in ("ready", "started", "processed"):
            counts[name] = round(counts[name] * factor)
        counts["completed"] = counts["processed"] - open_ones


def world_scale(module: LightningModule) -> float:
    """What undoes the averaging over ranks and over accumulated batches that strategies and Lightning do."""
    strategy = module.trainer.strategy
    same = strategy.tensor_parallel_size if isinstance(strategy, FSDP2Strategy) else 1  # they share what they compute
    return float(module.trainer.world_size // same * module.trainer.accumulate_grad_batches)


def _plain(value: Any) -> Any:
    """A copy made of dicts, lists, strings and numbers, which a weights-only load accepts."""
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set) else value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))
