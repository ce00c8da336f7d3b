"""The accelerators on which a test runs, and runs on them."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from tests.helpers import Seen, chats, sft_data, trainer

GPU = pytest.mark.gpu
BOTH = pytest.mark.parametrize(
    "accelerator", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("gpu", marks=GPU)]
)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def fit(folder: Path, module: Any, resume: Any = None, **options: Any) -> tuple[Seen, Trainer]:
    """Two epochs of two steps, with a checkpoint after each step; what it saw, and its Trainer."""
    seen = Seen()
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [seen, saver, *options.pop("callbacks", ())]
    usual: dict[str, Any] = {"devices": 1, "max_epochs": 2, "enable_checkpointing": True, "log_every_n_steps": 1}
    runner = trainer(folder, callbacks=callbacks, gradient_clip_val=1.0, **(usual | options))
    runner.fit(module, sft_data(module, chats(8), packing=False, batch_size=4), ckpt_path=resume)
    return seen, runner
