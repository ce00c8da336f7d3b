"""What of a module stands in a checkpoint, and how a training goes on from one."""

from abc import abstractmethod
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig
from torch import Tensor, nn

from lit_alignment.checkpoints.restore import refuse_missing, saved_names
from lit_alignment.checkpoints.saved import CHECKPOINT_KEY
from lit_alignment.checkpoints.states import check_moments, keep_own_paths
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.batching.position import FROM_WEIGHTS
from lit_alignment.data.batching.standing import (
    accumulation,
    catch_up,
    forget_loader,
    recount,
    refuse_half_step,
    reload_loader,
    seed_step,
    settle,
    skip_validation,
    total_steps,
    validate_last,
)
from lit_alignment.data.planned import data_rank
from lit_alignment.errors import CheckpointError
from lit_alignment.files import conformed
from lit_alignment.hooks import MethodHooks
from lit_alignment.models.adalora import RankSchedule
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.optimizers.resuming import apply_settings
from lit_alignment.training.averaging import (
    EvaluatedAverage,
    average_what_trains,
    is_average_live,
    make_due_updates,
)
from lit_alignment.training.precision import PreciseModule
from lit_alignment.training.run_summary import run_summary

# Of adapters' settings those that say how they train, or where they come from, and not what they compute.
OF_TRAINING = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}
OF_TRAINING |= {"lora_dropout", "init_lora_weights", "total_step", "tinit", "tfinal", "deltaT", "orth_reg_weight"}
OF_TRAINING |= {"beta1", "beta2", "target_r", "runtime_config", "loftq_config", "eva_config", "corda_config"}
AS_TRAINED = "Give the config.yaml of its run with --config, or set model.peft to what was trained"
LIVE = "current_model_state"  # the trained weights, where those of the checkpoint are averages; Lightning's name


class CheckpointedModule(MethodHooks, PreciseModule):
    """Saves what was trained and where the training stands, and goes on from there.

    Attributes:
        model: What trains, once it is loaded.
        backbone: The pretrained model.
        peft_config: New adapters.
        adapter: An existing adapter.
        tokens_config: Special and new tokens.
        optimizer_config: Optimizer and schedule.
        settings: Of each group of parameters, as this run's configuration has them.
    """

    model: nn.Module | None
    backbone: BackboneConfig
    peft_config: PeftConfig | None
    adapter: AdapterConfig | None
    tokens_config: TokensConfig
    optimizer_config: OptimizerConfig

    def __init__(self) -> None:
        """Nothing has been done."""
        super().__init__()
        self.settings: list[dict[str, Any]] = []
        self._ranks: RankSchedule | None = None
        self._averaging: list[WeightAveraging] = []  # callbacks
        self._evaluated = EvaluatedAverage()
        self._stepping = False  # whether the optimizer is at work
        self._validated: tuple[int, int] | None = None  # epoch and micro-batch behind which the last validation stood
        self.figures: dict[str, float] = {}  # of the last validation
        self._figures_step = 0
        self._measured = False  # whether a validation's metrics are of the weights of now

    def setup(self, stage: str) -> None:
        """Have averaging callbacks average what trains; nothing has been done in this run."""
        self._validated, self._stepping, self._measured = None, False, False
        self._evaluated = EvaluatedAverage()
        self._averaging = average_what_trains(self.trainer, self) if stage == "fit" else []

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """Name of the optimizer's class."""

    def on_fit_start(self) -> None:
        """Find out whether ranks fall.

        Raises:
            ConfigError: If they do not end with the run.
        """
        self._ranks = RankSchedule.of(self.model)
        if self._ranks is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._ranks.check(total_steps(self.trainer))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Let ranks fall behind the step, before its gradients go."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._ranks is not None and any(p.grad is not None for p in self.parameters()):
            self._ranks.step(self.trainer.global_step)  # Lightning counts the step when this returns

    @property
    def has_penalty(self) -> bool:
        """Whether adapters add to the loss of each optimizer step."""
        return self._ranks is not None

    def adapter_penalty(self) -> Tensor:
        """What they add, scalar."""
        return torch.zeros(()) if self._ranks is None else self._ranks.penalty()

    def on_train_start(self) -> None:
        """Do what was due where a resumed run stands, with this run's settings."""
        schedule: Any = self.lr_schedulers()
        changed = []
        for optimizer in self.trainer.optimizers:
            check_moments(optimizer)
        if self.settings:  # else a subclass has made the optimizer
            changed = apply_settings(self.trainer.optimizers[0], schedule, self.settings)
        changed += (begun := datamodule_of(self.trainer).begun).changed
        if begun.changed:
            reload_loader(self.trainer)
        if changed:
            rank_zero_info(f"changed since the checkpoint: {'; '.join(changed)}")
        make_due_updates(self._averaging, self.trainer, self)
        catch_up(self.trainer, self._validated)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw the random numbers of each optimizer step anew."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            seed_step(self.trainer, data_rank(self.trainer)[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the validation's metrics: no checkpoint is ranked by what other weights gave."""
        if self._measured:  # Lightning reads what is logged, on the device, whenever it is asked for its metrics
            for name in [name for name in self.trainer.callback_metrics if name.startswith("val/")]:
                del self.trainer.callback_metrics[name]
        self._stepping, self._measured = True, False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is whole; a validation inside of its window, if there was one before a resume, is not repeated."""
        self._stepping = False
        validate_last(self.trainer)
        if self._validated is not None:
            skip_validation(self.trainer, self._validated)

    def on_validation_model_eval(self) -> None:
        """Evaluate the weights that an optimizer averages, if it does."""
        super().on_validation_model_eval()
        if self.trainer.state.fn == "fit":
            self._evaluated.enter(self.trainer.optimizers)

    def on_validation_model_train(self) -> None:
        """Go on from those that it trains."""
        super().on_validation_model_train()
        self._evaluated.leave()

    def on_train_end(self) -> None:
        """Leave behind what an optimizer averages, if it does; what is saved from here on still has both."""
        self._evaluated.enter(self.trainer.optimizers)

    def on_validation_epoch_end(self) -> None:
        """Remember where the last validation stood, and that there are its metrics."""
        self._measured = True
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            self._validated = (self.trainer.current_epoch, progress.ready)

    def on_train_epoch_end(self) -> None:
        """The next epoch has as many batches as an epoch has, if this one was begun with other batches."""
        if (begun := datamodule_of(self.trainer).begun).changed and begun.epoch == self.trainer.current_epoch:
            forget_loader(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights only, and write down what they belong to and where they stand, as plain values."""
        names = saved_names(self)
        if LIVE in checkpoint and is_average_live(self._averaging):
            checkpoint["state_dict"], checkpoint[LIVE] = checkpoint[LIVE], checkpoint["state_dict"]
        self._evaluated.save(self, checkpoint, LIVE)
        for key in ("state_dict", LIVE):
            if key in checkpoint:
                checkpoint[key] = {k: v for k, v in checkpoint[key].items() if k in names}
        checkpoint[CHECKPOINT_KEY] = {
            "module": f"{type(self).__module__}.{type(self).__qualname__}",
            "backbone": asdict(self.backbone),
            "peft": None if self.peft_config is None else _plain(self.peft_config.to_dict()),
            "adapter": None if self.adapter is None else asdict(self.adapter),
            "tokens": asdict(self.tokens_config),
            "chat_template": datamodule_of(self.trainer).chat_template(),
            "asking": _plain(datamodule_of(self.trainer).asking_settings()),
            "adalora": None if self._ranks is None else self._ranks.state_dict(),
            "optimizer": self.algorithm,
            "run": _plain(self._run()),
            "validated": None if self._validated is None else [*self._validated],
            **self.checkpoint_metadata(),
        }
        refuse_half_step(self.trainer, self._stepping)
        settle(checkpoint, self.trainer)

    def _run(self) -> dict[str, Any]:
        """What the training is, and what the last validation has measured."""
        about = run_summary(self.trainer, self.optimizer_config, self.algorithm, self.method_settings())
        return {"method": self.title, **about, "figures": self.figures, "measured_at": self._figures_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or method; in a fit, also one that does not say where it stood.

        Raises:
            CheckpointError: Saying how to start from its weights.
        """
        about = checkpoint.get(CHECKPOINT_KEY, {})
        self._refuse_other(about)
        refuse_missing(saved_names(self), checkpoint["state_dict"], "Check model.peft and model.backbone.")
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        keep_own_paths(checkpoint.get("callbacks", {}), self.trainer)
        data = datamodule_of(self.trainer)
        stored = checkpoint.get(type(data).__qualname__, {})
        if not checkpoint.get("loops", {}).get("fit_loop") or "train" not in stored:
            raise CheckpointError(
                f"the checkpoint does not say where the training stood, so it cannot be resumed; {FROM_WEIGHTS}."
            )
        if LIVE in checkpoint and self._averaging:  # the callback wants them all
            checkpoint[LIVE] = self.state_dict() | checkpoint[LIVE]
        elif LIVE in checkpoint:
            checkpoint["state_dict"] = checkpoint[LIVE]
        ranks = RankSchedule.of(self.model)
        if ranks is not None and about.get("adalora") is not None:
            ranks.load_state_dict(about["adalora"])
        self._refuse_other_optimizer(about.get("optimizer", "AdamW"))
        data.update_checkpoint(checkpoint, stored)
        data.load_state_dict(stored)
        begun, most = data.begun, self.trainer.max_epochs
        if most is not None and 0 <= most < begun.epoch:
            raise CheckpointError(
                f"the checkpoint has {begun.epoch} epochs behind it, and trainer.max_epochs is {most}. Raise it."
            )
        if about.get("validated") is not None:
            first, second = conformed(about["validated"], (0, 0), "lit_alignment.validated", counts=True)
            self._validated = (first, second)
            if begun.changed and self._validated >= (begun.epoch, stored["train"]["batches"]):
                self._validated = (begun.epoch, begun.batches)
        if begun.changed and begun.batches:
            recount(checkpoint, begun.batches, accumulation(self.trainer, begun.epoch))
        rank_zero_info(f"resuming behind optimizer step {begun.global_step}, in epoch {begun.epoch}")

    def _refuse_other_optimizer(self, then: str) -> None:
        """Refuse the states of another algorithm."""
        if then != self.algorithm:
            raise CheckpointError(
                f"the checkpoint's optimizer is {then}, this run's {self.algorithm}. Set optimizer.algorithm to what "
                f"it was; or {FROM_WEIGHTS}."
            )

    def _refuse_other(self, about: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or backbone, whose weights may have the same names.

        Args:
            about: What the checkpoint says of itself.
        """
        method = str(about.get("module", "")).rpartition(".")[2]
        if method not in {kind.__name__ for kind in type(self).__mro__}:
            raise CheckpointError(
                f"the checkpoint is of {method or 'no module of lit_alignment'}, not of {type(self).__name__}. "
                f"To go on from its weights, {FROM_WEIGHTS}."
            )
        refuse_other_adapters(about.get("peft"), self.peft_config)
        then, now = about["backbone"], self.backbone
        if model_name(then["path"]) != model_name(now.path) or then["revision"] not in ("main", now.revision):
            raise CheckpointError(
                f"the checkpoint was trained over {then['path']}, revision {then['revision']}, not over {now.path}, "
                f"revision {now.revision}. Set model.backbone.path and revision to these; or {FROM_WEIGHTS}."
            )


def refuse_other_adapters(then: dict[str, Any] | None, config: PeftConfig | None) -> None:
    """Refuse adapters that would make another network of the same weights, or have no place for all of them.

    Args:
        then: The checkpoint's, as plain values.
        config: This run's.

    Raises:
        CheckpointError: Naming what differs.
    """
    now = None if config is None else _plain(config.to_dict())
    if then is None or now is None:
        if (then is None) != (now is None):
            have = "has no adapters, and this run has" if then is None else "has adapters, and this run has none"
            raise CheckpointError(f"the checkpoint {have}. {AS_TRAINED}; or {FROM_WEIGHTS}.")
        return
    for key in sorted((then.keys() & now.keys()) - OF_TRAINING):
        if then[key] != now[key]:
            raise CheckpointError(
                f"the checkpoint's adapters have {key}: {then[key]}, this run's {now[key]}. {AS_TRAINED}; or "
                f"{FROM_WEIGHTS}."
            )


def model_name(path: str) -> str:
    """The last part of a model's path or hub name, which stays when a folder is moved."""
    return path.rstrip("/").rpartition("/")[2]


def _plain(value: Any) -> Any:
    """A copy made of dicts, lists, strings and numbers, which a weights-only load accepts."""
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set) else value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))
