"""A run under each algorithm resumes to the bit; a checkpoint of another one is refused."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import MuonWithAdamW
from lit_alignment.errors import CheckpointError
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import chats, sft_data, sft_module, trainer, weights


def eight_bits(package, name, **settings):
    """An 8-bit optimizer that holds small weights in 8 bits, too."""
    kind = getattr(pytest.importorskip(package, reason=f"{package} is not installed"), name)
    return lambda groups, rate: kind(groups, rate, **settings)


ALGORITHMS = {
    "muon": lambda: MuonWithAdamW,
    "adafactor": lambda: torch.optim.Adafactor,
    "bitsandbytes": lambda: eight_bits("bitsandbytes.optim", "AdamW8bit", min_8bit_size=1),
    "torchao": lambda: eight_bits("torchao.optim", "AdamW8bit", block_size=64),
}


def fit(folder, algorithm, resume=None):
    usual = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup": 2}
    module = sft_module(optimizer=OptimizerConfig(**usual, algorithm=algorithm, rates={"norm": 1e-3}))
    data = sft_data(module, chats(12), packing=False, batch_size=2)
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"max_steps": 4, "max_epochs": -1, "enable_checkpointing": True, "gradient_clip_val": 1.0}
    trainer(folder, callbacks=[saver], **options).fit(module, data, ckpt_path=resume)
    return weights(module)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_run_resumes_to_the_bit(tmp_path, name):
    algorithm = ALGORITHMS[name]()
    with torch.compiler.set_stance("force_eager"):
        whole = fit(tmp_path / "whole", algorithm)
        again = fit(tmp_path / "again", algorithm, resume=tmp_path / "whole/step=2.ckpt")
    assert all(torch.equal(again[each], value) for each, value in whole.items())


@pytest.mark.slow
def test_checkpoint_of_another_algorithm_is_refused(tmp_path):
    fit(tmp_path / "muon", MuonWithAdamW)
    with pytest.raises(CheckpointError, match="optimizer is MuonWithAdamW, this run's AdamW. Set optimizer.algorithm"):
        fit(tmp_path / "adamw", None, resume=tmp_path / "muon/step=2.ckpt")
