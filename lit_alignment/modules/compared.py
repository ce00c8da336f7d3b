"""What modules share whose model is compared with the model before training."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_alignment.checkpoints.saved import CHECKPOINT_KEY
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.batching.collate import TargetBatch
from lit_alignment.data.batching.position import FROM_WEIGHTS
from lit_alignment.distributed.sharding import reshard
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import load_network
from lit_alignment.models.reference import (
    FrozenCopy,
    ReferenceSyncConfig,
    adapter_weights,
    adapters_off,
    add_reference,
    is_reference,
    leaves_base,
    mix_into,
    model_weights,
    quiet_logps,
    reference_on,
    without_dropout,
)
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.training.preference_reference import ReferenceKind


class ComparedModule(GenerativeModule):
    """A policy beside its reference, the model before training, or one that follows it; both without dropout.

    Attributes:
        reference: How the reference is held; a method sets it, with the next two, before anything is loaded.
        reference_sync: How it follows the policy.
        reference_model: The reference, where it is a model of its own; None before it is loaded.
    """

    reference: ReferenceKind
    reference_sync: ReferenceSyncConfig | None
    reference_model: nn.Module | None

    def setup(self, stage: str) -> None:
        """Refuse a reference that follows where checkpoints could not hold it."""
        super().setup(stage)
        if self.reference_sync is not None and stage != "predict" and not self.features.supports("frozen_weights"):
            raise ConfigError(
                "model.reference_sync: checkpoints of DeepSpeed leave the reference out, which changes. Use DDP or "
                "lit_alignment.FSDP2Strategy."
            )

    def load_model(self, *arguments: Any, **options: Any) -> nn.Module:
        """Load the weights, without dropout, and what of the reference stands in the same model."""
        self._random_state, self._untrained = torch.get_rng_state(), True
        network = super().load_model(*arguments, **options)
        if (dropout := without_dropout(network)) and self._compares and self.trainer.state.fn == "fit":
            rank_zero_warn(
                f"dropout of {dropout:g} is off in training, too: policy and reference would differ by chance."
            )
        if self.frozen_copy == "adapter" and self._compares:
            add_reference(network)
        return network

    def load_extra_networks(self, device_type: str = "cpu") -> None:
        """Load the model a second time, if all of its weights train, or its adapters have changed them."""
        if self.frozen_copy == "model" and self._compares:
            self.reference_model = self._load_reference(device_type)

    def _load_reference(self, device_type: str, adapter: AdapterConfig | None = None) -> nn.Module:
        """The model before training, frozen."""
        data = datamodule_of(self.trainer)
        with torch.random.fork_rng():  # new weights, as of new tokens, begin as the policy's
            torch.set_rng_state(self._random_state)
            reference = load_network(
                self.backbone,
                self.tokenizer,
                tokens=self.tokens_config,
                added=self.added_tokens,
                adapter=adapter,
                packing=data.packing,
                shared_prompts=data.share_prompts,
                device_type=device_type,
            )
        return reference.requires_grad_(False).eval()

    def extra_networks(self) -> dict[str, nn.Module]:
        """The reference, where it is a model of its own."""
        return {} if self.reference_model is None else {"the reference": self.reference_model}

    @property
    def frozen_copy(self) -> FrozenCopy:
        """The reference: the whole model, or a second adapter."""
        if self.reference != "frozen_copy":
            return "nothing"
        beside = self.adapter is not None or (self.peft_config is not None and self.reference_sync is not None)
        return "adapter" if beside else "model"

    @property
    def _compares(self) -> bool:
        """Whether this run computes losses, or metrics, for which it needs the reference."""
        return self._trainer is not None and self.trainer.state.fn in ("fit", "validate", "test")

    def reference_logps(
        self, batch: TargetBatch, cached: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor | None:
        """Log-probability of each target under the reference, [N]; None if there is no reference.

        Args:
            batch: The rows.
            cached: Of these, where they were computed before training.
            temperature: Divides the logits.
        """
        network = self.network
        switched: AbstractContextManager[None] = nullcontext()
        match self.reference:
            case "none":
                return None
            case "cached":
                return cached
            case "adapter_off":
                switched = adapters_off(network)
            case "frozen_copy" if self.reference_model is not None:
                network = self.reference_model
            case _:
                switched = reference_on(network)
        with switched:
            return quiet_logps(network, batch, self.sequence, temperature)

    @contextmanager
    def before_training(self, adapter: AdapterConfig | None) -> Iterator[Callable[[TargetBatch], Tensor]]:
        """What computes log-probabilities under the model before training: the policy, until it trains.

        Args:
            adapter: What it starts with.
        """
        network = self.network
        switched: AbstractContextManager[None] = nullcontext()
        if self.peft_config is not None and leaves_base(self.peft_config):
            switched = adapters_off(network)
        elif not self._untrained:
            network = self._load_reference(self.device.type, adapter)
            self.features.shard(network, layered=True)
            network.to(self.device)
        with switched:
            yield lambda batch: quiet_logps(network, batch, self.sequence)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """From here on the policy is no longer the model before training.

        Raises:
            CheckpointError: If the reference followed the policy in one of both runs alone.
        """
        follows = self.reference_sync is not None
        if self._compares and checkpoint.get(CHECKPOINT_KEY, {}).get("reference_follows", False) != follows:
            raise CheckpointError(
                f"model.reference_sync is {'set' if follows else 'not set'}, and in the run of the checkpoint it was "
                f"{'not' if follows else 'set'}. Set it as then; or {FROM_WEIGHTS}."
            )
        super().on_load_checkpoint(checkpoint)
        self._untrained = False

    def on_train_start(self) -> None:
        """From here on the policy is no longer the model before training."""
        super().on_train_start()
        self._untrained = False

    # A reference that follows the policy.

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Let the reference follow when its time has come: within the step, so that no checkpoint stands between."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        sync, done = self.reference_sync, self.trainer.global_step + 1  # Lightning counts the step when this returns
        if sync is not None and done % sync.every_n_steps == 0:
            copied = self.reference_model
            reshard(self)
            of_both = adapter_weights(self.network) if copied is None else model_weights(self.network, copied)
            mix_into(of_both, sync.mix)

    @property
    def following_names(self) -> set[str]:
        """The weights of the reference, if it follows the policy."""
        if self.reference_sync is None:
            return set()
        return {name for name, _ in self.named_parameters(remove_duplicate=False) if is_reference(name)}

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Also whether the reference follows the policy."""
        return {**super().checkpoint_metadata(), "reference_follows": self.reference_sync is not None}
