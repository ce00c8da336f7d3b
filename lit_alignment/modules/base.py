"""What every method's LightningModule shares: loading, adapters, the loss of a step, optimiser, slim checkpoints."""

from abc import abstractmethod
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig
from torch import Tensor, nn

from lit_alignment.data.base import datamodule_of
from lit_alignment.errors import ConfigError
from lit_alignment.models.adapters import Adapter
from lit_alignment.models.loading import Backbone, Head, load_network, load_tokenizer
from lit_alignment.models.restoring import CHECKPOINT_KEY, refuse_missing, trained_names
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.optimization import OptimizerConfig, build_optimizer
from lit_alignment.strategies.fsdp2 import FSDP2Strategy


class AlignmentModule(LightningModule):
    """A language model with a tokenizer, trained in part or whole.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An adapter that exists, frozen or to go on with.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimiser and schedule.
    """

    head: Head | None = None  # what scores, where the model is no language model

    def __init__(
        self,
        backbone: Backbone,
        peft: PeftConfig | None,
        adapter: Adapter | None,
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

    # Model.

    def configure_model(self) -> None:
        """Load the weights, once."""
        if self.model is None:
            data = datamodule_of(self.trainer)
            model = self.load_model(self.trainer.strategy.root_device.type, data.packing, data.share_prompts)
            self.shard(model, layered=True)

    def shard(self, part: nn.Module, layered: bool = False) -> None:
        """Split a part of the model over devices, if the strategy does that.

        Args:
            part: The part.
            layered: Whether it is a language model, to be split layer by layer.

        Raises:
            ConfigError: If the strategy is Lightning's own, whose checkpoints cannot hold trained weights alone.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            strategy.shard(part, layered)
        elif isinstance(strategy, ModelParallelStrategy):
            raise ConfigError("trainer.strategy: use lit_alignment.FSDP2Strategy in place of ModelParallelStrategy.")

    def load_model(self, device_type: str = "cpu", packing: bool = False, shared_prompts: bool = False) -> nn.Module:
        """Load the weights, with tokens and adapters, without a Trainer."""
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
        return loss

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
        """Log the loss of the whole optimiser step, and the gradient norm before clipping."""
        mean = self._window_loss / self.trainer.accumulate_grad_batches
        self.log("train/loss", mean, prog_bar=True, sync_dist=True)
        self._window_loss = 0.0
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

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
            "ranks": self.trainer.world_size,
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
            _recount(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], ranks / self.trainer.world_size)

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
    return float(module.trainer.world_size * module.trainer.accumulate_grad_batches)


def _plain(value: Any) -> Any:
    """A copy made of dicts, lists, strings and numbers, which a weights-only load accepts."""
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set) else value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))
