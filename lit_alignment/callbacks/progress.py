"""What a run says of itself: the size of its model, and its progress as a bar in a terminal or lines in a log."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count

FEW_STEPS = 20
EVALUATION_SECONDS = 30.0  # between two lines of validate, test and predict


def progress() -> ProgressBar:
    """A bar in a terminal, lines in a log."""
    return Bar() if sys.stdout.isatty() else ProgressLines()


class ModelSize(ModelSummary):
    """One line in place of Lightning's table: how many parameters there are, and how many of them train."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count them, and say it."""
        found = self._summary(trainer, pl_module)
        counts = zip(found.layer_names, found.param_nums, strict=True)
        parts = [f"{name} {get_human_readable_count(number)}" for name, number in counts if number]
        rank_zero_info(
            f"parameters: {get_human_readable_count(found.total_parameters)} ({', '.join(parts)}), "
            f"{get_human_readable_count(int(found.trainable_parameters))} of them trained"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where a training ends before it can have learned much, unless its steps were asked for."""
        steps = trainer.estimated_stepping_batches
        if steps < FEW_STEPS and trainer.max_steps < 0:
            rank_zero_info(
                f"{steps:.0f} optimizer steps in all, which teach little. Raise trainer.max_epochs, or lower "
                "trainer.accumulate_grad_batches or data.tokens_per_batch (data.batch_size without packing)."
            )


class Bar(RichProgressBar):
    """Lightning's bar, which ends where the run ends."""

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of the epoch, or those that are left until `max_steps`."""
        total, trainer = super().total_train_batches, self.trainer
        if trainer.max_steps is None or trainer.max_steps < 0:
            return total
        window, done = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop.batch_idx + 1
        left = trainer.max_steps - trainer.global_step
        return min(total, done - done % window + left * window)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What was logged for it, without the number of the run's folder."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        end = "" if last is None or last < 0 else f"/{last}"
        return f"Epoch {current_epoch + 1}{end}".ljust(len(self.validation_description))


class ProgressLines(ProgressBar):
    """One line every `trainer.log_every_n_steps` steps, of what a bar would show, from rank 0.

    `step 20/100, epoch 1, loss 1.23, 512 tokens/s, 3:10 left`; tokens/s is there with the Throughput callback.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()
        self._enabled = True
        self._begin = self._said = time.monotonic()
        self._first_step = self._last_step = 0

    def disable(self) -> None:
        """Say nothing, on all ranks but one."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begin, self._first_step = time.monotonic(), trainer.global_step
        self._last_step = self._first_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Say how far it is, at every n-th step."""
        step = trainer.global_step
        if step == self._last_step or not self._enabled:
            return
        self._last_step = step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % max(1, every) == 0:
            print(self._line(trainer, pl_module, step), flush=True)

    def _line(self, trainer: Trainer, module: LightningModule, step: int) -> str:
        total = trainer.estimated_stepping_batches
        known = total != float("inf")
        parts = [f"step {step}/{total:.0f}" if known else f"step {step}", f"epoch {trainer.current_epoch + 1}"]
        for name, shown in self.get_metrics(trainer, module).items():
            stage, _, short = str(name).rpartition("/")
            value: Any = shown
            if stage == "train" and short.endswith("_per_second"):
                parts.append(f"{float(value):.0f} {short.removesuffix('_per_second')}/s")
            elif stage == "train":
                parts.append(f"{short} {float(value):.4g}")
        if known:
            seconds = (time.monotonic() - self._begin) / (step - self._first_step) * (total - step)
            parts.append(f"{timedelta(seconds=round(seconds))}".removeprefix("0:").removeprefix("0") + " left")
        return ", ".join(parts)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of its lines."""
        self._said = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was measured."""
        found = {str(name): value for name, value in trainer.callback_metrics.items() if str(name).startswith("val/")}
        if self._enabled and found and trainer.state.fn == "fit" and not trainer.sanity_checking:
            shown = ", ".join(f"{name.removeprefix('val/')} {float(value):.4g}" for name, value in found.items())
            print(f"validation: {shown}", flush=True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Say how far it is, now and then."""
        if not trainer.sanity_checking:
            self._evaluated("validation", batch_idx, trainer.num_val_batches[0])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """The same."""
        self._evaluated("test", batch_idx, trainer.num_test_batches[0])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """The same."""
        self._evaluated("predict", batch_idx, trainer.num_predict_batches[0])

    def _evaluated(self, stage: str, index: int, total: int | float) -> None:
        if self._enabled and time.monotonic() - self._said > EVALUATION_SECONDS:
            self._said = time.monotonic()
            print(f"{stage}: batch {index + 1}/{total:.0f}", flush=True)
