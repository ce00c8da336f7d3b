"""The curves of every training, and when its page is written."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_alignment.callbacks.curves import Curves
from lit_alignment.callbacks.page import ReportPart, write_page


class RunReport(ReportPart):
    """Writes `report.html` into the run's folder at each validation and at the end; it needs no other file.

    Attributes:
        curves: What was logged, over optimizer steps: loss, gradient norm, learning rate, and all of validation.
    """

    def __init__(self) -> None:
        """Nothing was logged yet."""
        self.curves, self.picks = Curves(), []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remember what was logged."""
        self.curves.note_step(trainer, pl_module, ("grad_norm",))
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.optimizers and step % max(1, every) == 0:
            self.curves.add("train/learning_rate", step, float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was measured, and write the page."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        names = [name.removeprefix("val/") for name in trainer.callback_metrics if name.startswith("val/")]
        self.curves.note_validation(trainer, names)
        self.write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        self.write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same, if something was trained."""
        self.curves.settle()
        if trainer.state.fn == "fit" and self.curves and trainer.world_size == 1:  # else ranks may have parted
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the page, on one process."""
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # every rank must ask for it
        self.curves.settle()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_page(directory, trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue the same curves."""
        return {"curves": self.curves.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's curves."""
        self.curves.load_state_dict(state_dict["curves"])
