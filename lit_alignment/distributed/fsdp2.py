"""Fully sharded training: FSDP2 under Lightning's ModelParallelStrategy, with checkpoints of what was trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import ProcessGroup, new_group
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_alignment.checkpoints.background import Queued, SaveQueue
from lit_alignment.checkpoints.restore import refuse_missing, saved_names
from lit_alignment.checkpoints.sharded import (
    OPTIMIZER,
    by_name,
    by_number,
    cannot_save,
    found_path,
    full,
    is_sharded,
    new_partial,
    on_first,
    put_in_place,
    read_into,
    read_rest,
    split_checkpoint,
    stored_names,
)
from lit_alignment.data.batching.collate import ScoreBatch, TargetBatch, local_positions
from lit_alignment.distributed.features import Feature, StrategyFeatures
from lit_alignment.distributed.sharding import Cast, shard_layers, unsharded
from lit_alignment.distributed.tensor_parallel import split_layers
from lit_alignment.errors import CheckpointError, ConfigError, present
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.optimization import OptimizerConfig, algorithm_class
from lit_alignment.optimizers.muon import MuonWithAdamW
from lit_alignment.optimizers.schedule_free import ScheduleFreeAdamW


class FSDP2Strategy(ModelParallelStrategy, Queued, StrategyFeatures):
    """Shard weights, gradients and optimizer state over all devices, each decoder layer on its own.

    Under `precision: bf16-mixed` weights are gathered in bfloat16, and gradients are summed in float32. Checkpoints
    hold what was trained, in shards or whole, and resume on any number of devices.

    Args:
        save_distributed_checkpoint: Each process writes its shards into a folder; false gathers them into one file.
        cpu_offload: Keep shards, and run the optimizer, in the memory of the host.
        sequence_parallel_size: Neighbouring processes that share each packed row, for rows that are too long for one.
        tensor_parallel_size: Neighbouring processes that share each decoder layer's matrices.
        async_save: Write checkpoints in a thread while training continues; each process holds a copy of its shards.
        process_group_backend: By default NCCL on GPUs, gloo on CPUs.
        timeout: How long a process waits for the others.

    Source: Zhao et al. 2023, PyTorch FSDP (arXiv:2304.11277).
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        cpu_offload: bool = False,
        sequence_parallel_size: int = 1,
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        async_save: bool = False,
    ) -> None:
        """Nothing is started yet."""
        super().__init__("auto", tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout)
        self.cpu_offload = cpu_offload
        self.sequence_parallel_size, self.tensor_parallel_size = sequence_parallel_size, tensor_parallel_size
        self.sequence = None
        self.identical_ranks = tensor_parallel_size
        self.saves = SaveQueue(async_save)
        self._group: ProcessGroup | None = None  # of the thread that saves
        # The queue copies to the host itself.
        self._copy_state = not (async_save and save_distributed_checkpoint)

    @override
    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        sequence, tensor = self.sequence_parallel_size, self.tensor_parallel_size
        if sequence > 1 and tensor > 1:
            raise ConfigError("trainer.strategy: sequence_parallel_size and tensor_parallel_size: raise one of them.")
        for name, size in (("sequence", sequence), ("tensor", tensor)):
            if self.world_size % size:
                raise ConfigError(
                    f"trainer.strategy.{name}_parallel_size is {size}, by which {self.world_size} processes cannot be "
                    "divided. Use a divisor."
                )
        self._data_parallel_size = self.world_size // tensor
        if sequence > 1:
            group, _ = dist.new_subgroups(sequence)  # type: ignore[no-untyped-call]
            self.sequence = SequenceGroup(group, self.global_rank % sequence, sequence)
        if self.saves.background and self._group is None:
            self._group = new_group(backend="gloo", timeout=self._timeout)

    @override
    def _get_process_group_backend(self) -> str:
        """Gloo beside NCCL where shards are in the memory of the host, of which NCCL sums no gradient norm."""
        if self._process_group_backend is None and self.cpu_offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"
        return super()._get_process_group_backend()

    @override
    def model_to_device(self) -> None:
        """Move the module to the device, but for shards that are offloaded, which FSDP2 brings there itself."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        model, device = present(self.model, "the strategy's model"), self.root_device
        change: Callable[..., nn.Module] = model._apply
        change(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(device))
        _update_properties(model, device)  # so that the module says where it computes

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share rows or matrices have the same batches."""
        size = self.sequence_parallel_size * self.tensor_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """A batch on the device, in which this rank's positions of a shared row are found before: on the host."""
        if self.sequence is not None and isinstance(batch, TargetBatch | ScoreBatch):
            batch.local = local_positions(batch.read_at, self.sequence.own(batch.input_ids.shape[1]))
        return super().batch_to_device(batch, device, dataloader_idx)

    # What modules ask.

    @override
    def supports(self, feature: Feature) -> bool:
        if feature == "compiled_layers":  # torch.compile does not get through matrices that ranks share
            return self.tensor_parallel_size == 1
        return feature not in ("whole_weights", "quantization")

    @override
    def check_run(self, method: str, stage: str, shares_batches: bool, optimizer: OptimizerConfig) -> None:
        for name in ("sequence_parallel_size", "tensor_parallel_size"):
            if getattr(self, name) > 1 and not shares_batches:
                raise ConfigError(f"trainer.strategy.{name}: not for {method} yet. Set it to 1.")
        if self.tensor_parallel_size > 1 and stage == "predict":
            raise ConfigError("trainer.strategy.tensor_parallel_size: not for predict. Set it to 1.")
        if stage != "fit":
            return
        kind = algorithm_class(optimizer)
        if reason := self._unsharded_reason(kind):
            raise ConfigError(f"optimizer.algorithm: FSDP2 cannot shard {kind.__name__}: {reason}.")

    def _unsharded_reason(self, kind: type[Optimizer]) -> str:
        """Why an optimizer cannot work on shards, and what can; empty if it can."""
        if issubclass(kind, ScheduleFreeAdamW):
            return "weights in shards cannot be averaged; use DDP"
        if issubclass(kind, torch.optim.Adafactor):
            return "torch takes no means of columns in place of a matrix whose rows are spread; use DDP"
        if kind.__module__.startswith("bitsandbytes"):
            return "its kernels take whole tensors; use torchao.optim.AdamW8bit, or DDP"
        if issubclass(kind, MuonWithAdamW) and self.cpu_offload:
            return "with cpu_offload the shards of a matrix cannot be gathered; set cpu_offload to false"
        return ""

    @override
    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Whole weights on every rank, which takes the memory of the whole model.

        Ranks that gather layer by layer have to make the same calls with the same number of tokens, or hang.
        """
        with unsharded(module):
            yield

    @override
    def shard(self, module: nn.Module, layered: bool = False, cast: Cast | None = None) -> None:
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.precision_plugin.precision))
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy(self.root_device.type == "cuda")
            if self.cpu_offload
            else OffloadPolicy(),
        }
        if self.tensor_parallel_size > 1:
            split_layers(module, self.device_mesh["tensor_parallel"])
        if layered:
            shard_layers(module, options, cast)
        else:
            fully_shard(module, **options)

    # Checkpoints.

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            CheckpointError: If the disk is full or the folder cannot be written; what was there before stays.
        """
        path = Path(self.broadcast(filepath))
        write = self._write_shards if self._save_distributed_checkpoint else self._write_whole
        self.saves.save(checkpoint, path, partial(write, path))

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint once those that were saved before are whole."""
        if self.is_global_zero:
            self.saves.remove(Path(filepath), partial(self.checkpoint_io.remove_checkpoint, filepath))

    def _write_whole(self, path: Path, checkpoint: dict[str, Any]) -> None:
        on_first(path, partial(self.checkpoint_io.save_checkpoint, checkpoint, path), self._group)

    def _write_shards(self, path: Path, checkpoint: dict[str, Any]) -> None:
        folder = new_partial(path, self._group)
        shards, rest = split_checkpoint(checkpoint)
        try:
            # A thread begins on the first GPU, whatever its process uses.
            with torch.cuda.device(self.root_device) if self.root_device.type == "cuda" else nullcontext():
                save(shards, checkpoint_id=folder, process_group=self._group)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(cannot_save(path, error)) from error
        on_first(path, partial(put_in_place, folder, path, rest), self._group)

    @override
    def teardown(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: If it could not be written; what was there before stays.
        """
        try:
            self.saves.close()
        finally:
            super().teardown()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of what was trained, which any number of processes has written, in shards or whole.

        Raises:
            CheckpointError: If it is damaged or lacks a trained weight.
        """
        self.saves.wait()
        path = found_path(Path(self.broadcast(checkpoint_path)))
        model = present(self.model, "the strategy's model")
        names = saved_names(model)
        own = {name: value for name, value in get_model_state_dict(model).items() if name in names}
        whole = None if is_sharded(path) else dict(self.checkpoint_io.load_checkpoint(path))
        found = set(whole["state_dict"]) if whole is not None else stored_names(path)
        refuse_missing(names, found, "Check model.peft and model.backbone.")
        if whole is None:
            read_into(path, {"state_dict": own})
            model.load_state_dict(own, strict=False)
        else:
            options = StateDictOptions(full_state_dict=True, strict=False)
            given = {name: whole["state_dict"][name] for name in sorted(names)}  # all processes in one order
            set_model_state_dict(model, given, options=options)
        for number, optimizer in enumerate(self.optimizers):  # none, but in fit
            state = get_optimizer_state_dict(model, optimizer)
            if whole is None:
                kept = {f"{OPTIMIZER}{number}": state}
                read_into(path, kept)
                state = kept[f"{OPTIMIZER}{number}"]
            else:
                state = by_name(whole["optimizer_states"][number], state["param_groups"])  # type: ignore[arg-type]
            options = StateDictOptions(full_state_dict=whole is not None)
            set_optimizer_state_dict(model, optimizer, optim_state_dict=state, options=options)
        return (read_rest(path) if whole is None else whole) | {"state_dict": own}

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What was trained; whole, on the first process alone, if it goes into one file."""
        self.saves.wait()  # so that one copy at most is in memory
        model = present(self.model, "the strategy's model")
        names = saved_names(model)
        if self._save_distributed_checkpoint:
            sharded = get_model_state_dict(model, options=StateDictOptions(cpu_offload=self._copy_state))
            return {name: value for name, value in sharded.items() if name in names}
        gathered: dict[str, Any] = {}
        for name, value in get_model_state_dict(model).items():
            if name in names:
                whole = full(value)  # on the devices: NCCL gathers nothing that is in the memory of the host
                gathered |= {name: whole.cpu()} if self.is_global_zero else {}
        return gathered

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state by names in shards, or as torch has it, on the first process alone."""
        model = present(self.model, "the strategy's model")
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        whole = not self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=whole, cpu_offload=self._copy_state)
        state: dict[str, Any] = get_optimizer_state_dict(model, inner, options=options)
        if self._save_distributed_checkpoint:
            return state
        return by_number(state) if self.is_global_zero else {}
