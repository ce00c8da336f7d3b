"""DeepSpeed's ZeRO under Lightning, with the optimizer steps, and the numbers, of any other strategy."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lit_alignment.checkpoints.reading import only_plain_values
from lit_alignment.checkpoints.sharded import cannot_save, new_partial, on_first, swap
from lit_alignment.distributed.features import Feature, StrategyFeatures
from lit_alignment.errors import CheckpointError, ConfigError, present
from lit_alignment.optimization import OptimizerConfig


class WeightsPrecision(DeepSpeedPrecision):
    """Leaves batches as they are: the weights of tokens are no activations."""

    @override
    def convert_input(self, data: Any) -> Any:
        return data


class DeepSpeedStrategy(LightningDeepSpeedStrategy, StrategyFeatures):
    """ZeRO stages 1 to 3, with or without offload; arguments are those of Lightning's strategy.

    DeepSpeed counts micro-batches by itself and would never step on an epoch's last, shorter window; here it steps when
    Lightning does. Checkpoints leave out frozen weights.

    Source: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054).
    """

    @override
    def setup_environment(self) -> None:
        """Start the processes.

        Raises:
            ConfigError: Without CUDA GPUs.
        """
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ConfigError(
                "trainer.strategy: DeepSpeed needs CUDA GPUs. Set trainer.accelerator: gpu, or use "
                "lit_alignment.FSDP2Strategy, which runs on CPUs too."
            )
        super().setup_environment()

    @property
    @override
    def precision_plugin(self) -> Precision:
        """Lightning's for DeepSpeed, but for batches."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        deepspeed = isinstance(plugin, DeepSpeedPrecision)
        self._precision_plugin = WeightsPrecision(plugin.precision) if deepspeed else plugin  # type: ignore

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """No: Lightning asks for a step when a window is complete, the last one of an epoch too."""
        return False

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Nothing: stages 2 and 3 sum the gradients of every micro-batch over the processes."""
        yield

    @override
    def setup(self, trainer: Trainer) -> None:
        """Start the engine, which changes the precision of weights; metrics and the angles of positions keep theirs."""
        self.exclude_frozen_parameters = True
        model = present(self.model, "the strategy's model")
        metrics = {
            n: child for n, child in model.named_children() if any(isinstance(m, Metric) for m in child.modules())
        }
        for name in metrics:
            del model._modules[name]
        kept = [{name: each.clone() for name, each in m.named_buffers(recurse=False)} for m in model.modules()]
        modules = list(model.modules())
        super().setup(trainer)
        for name, metric in metrics.items():
            model.add_module(name, metric.to(self.root_device))
        for part, buffers in zip(modules, kept, strict=True):
            part._buffers |= {name: each.to(self.root_device) for name, each in buffers.items()}

    @override
    @contextmanager
    def model_sharded_context(self) -> Generator[None]:
        """Nothing: the engine splits the weights of stage 3 once they are loaded, which each process does whole."""
        yield

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step of the module, after telling the engine whether it completes a window."""
        accumulates = present(self.lightning_module, "the strategy's module").trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As of the engine, which need not divide by the number of micro-batches: Lightning has done so."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder, whole or not at all.

        Raises:
            CheckpointError: If the disk is full or the folder cannot be written; what was there before stays.
        """
        path = Path(self.broadcast(filepath))
        folder = new_partial(path)
        try:
            super().save_checkpoint(checkpoint, folder)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(cannot_save(path, error)) from error
        self.barrier()
        on_first(path, partial(swap, folder, path))

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Let the engine read its part; the weights that it has found stand in the result by their names.

        Raises:
            CheckpointError: If it is damaged, or holds more than weights and plain values.
        """
        with only_plain_values(Path(checkpoint_path)):
            found = super().load_checkpoint(checkpoint_path, weights_only)
        return found | {"state_dict": {name: shape for group in found["param_shapes"] for name, shape in group.items()}}

    # What modules ask.

    @override
    def supports(self, feature: Feature) -> bool:
        # Stage 3 gathers weights in hooks of each matrix, of which a program would be compiled by turns.
        return feature in ("whole_weights", "gathering", "quantization", "compiled_layers") and not self.zero_stage_3

    @override
    def check_run(self, method: str, stage: str, shares_batches: bool, optimizer: OptimizerConfig) -> None:
        if optimizer.non_finite == "skip":
            raise ConfigError("optimizer.non_finite: DeepSpeed's engine cannot skip a step. Set it to stop.")
        if stage == "fit" and optimizer.algorithm is not None:
            raise ConfigError(
                "optimizer.algorithm: DeepSpeed's engine makes one vector of many weights and cuts it into equal "
                "parts, in which an algorithm finds no matrix, block or average. Leave it out for AdamW, or use "
                "lit_alignment.FSDP2Strategy."
            )

    @override
    def gradient_norm(self) -> float | None:
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)
