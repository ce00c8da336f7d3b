"""Every algorithm trains on a GPU in bf16-mixed, with clipping, and resumes to the bit."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import MuonWithAdamW, ScheduleFreeAdamW
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import chats, sft_data, sft_module, trainer, weights

pytestmark = pytest.mark.gpu


def of(package, name, **settings):
    """An algorithm of an optional package."""
    return partial(getattr(pytest.importorskip(package, reason=f"{package} is not installed"), name), **settings)


ALGORITHMS = {
    "adamw": lambda: None,
    "muon": lambda: MuonWithAdamW,
    "adafactor": lambda: torch.optim.Adafactor,
    "schedule_free": lambda: ScheduleFreeAdamW,
    "bitsandbytes": lambda: of("bitsandbytes.optim", "AdamW8bit", min_8bit_size=1),
    "torchao": lambda: of("torchao.optim", "AdamW8bit", block_size=64),
}


def fit(folder, algorithm, resume=None):
    usual = {"learning_rate": 1e-2, "weight_decay": 0.1, "schedule": "constant", "warmup": 2}
    module = sft_module(optimizer=OptimizerConfig(**usual, algorithm=algorithm, layer_decay=0.9))
    data = sft_data(module, chats(12), packing=False, batch_size=2)
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "gradient_clip_val": 1.0}
    options |= {"max_steps": 4, "max_epochs": -1, "enable_checkpointing": True, "deterministic": "warn"}
    trainer(folder, callbacks=[saver], **options).fit(module, data, ckpt_path=resume)
    return weights(module)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_run_resumes_to_the_bit(tmp_path, name):
    algorithm = ALGORITHMS[name]()
    whole = fit(tmp_path / "whole", algorithm)
    assert all(bool(torch.isfinite(value).all()) for value in whole.values())
    again = fit(tmp_path / "again", algorithm, resume=tmp_path / "whole/step=2.ckpt")
    assert all(torch.equal(again[each], value) for each, value in whole.items())
