"""Where the memory of a training went."""

import pytest
import torch

from lit_alignment import MemorySnapshot, SFTModule
from lit_alignment.errors import ConfigError
from tests.helpers import chats, sft_data, sft_module, trainer
from tests.helpers.commands import command

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB\nSee documentation."


def test_snapshot_is_refused_without_a_gpu(tmp_path):
    module = sft_module()
    with pytest.raises(ConfigError, match=r"MemorySnapshot: records allocations on a CUDA GPU, and this run is on cpu"):
        trainer(tmp_path, callbacks=[MemorySnapshot()]).fit(module, sft_data(module, chats(2)))
    with pytest.raises(ConfigError, match=r"MemorySnapshot.num_steps is 0; use 1 or more"):
        MemorySnapshot(num_steps=0)


def test_training_that_is_out_of_memory_says_what_was_expected_and_what_helps(tmp_path, monkeypatch):
    step = SFTModule.step

    def full(self, batch, stage):
        if stage == "train" and self.trainer.global_step == 1:
            raise torch.OutOfMemoryError(SAID)
        return step(self, batch, stage)

    monkeypatch.setattr(SFTModule, "step", full)
    result = command(
        "fit", "--config", "configs/sft/tiny.yaml", "--trainer.limit_val_batches=0", "--trainer.callbacks=[]",
        f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}",
    )  # fmt: skip
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB." in message
    assert "See documentation" not in message
    assert all(f" {part} 0.0" in message for part in ("weights", "gradients", "optimizer", "activations"))
    assert "(1) model.backbone.gradient_checkpointing: full (saves about" in message
    assert "(2) " in message and "(3) " in message and "(4) " not in message
