"""Optimizers on shards: the weights of one process, resumed to the bit, and what cannot work on shards is refused."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import DeepSpeedStrategy, FSDP2Strategy, MuonWithAdamW, ScheduleFreeAdamW
from lit_alignment.errors import ConfigError
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import chats, sft_data, sft_module, trainer
from tests.helpers.ranks import run_on_ranks

ALGORITHMS = {"muon": MuonWithAdamW, "adafactor": partial(torch.optim.Adafactor, d=2.0), "sgd": torch.optim.SGD}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fit(folder, name, strategy, accumulate, resume=None, max_steps=3):
    rate = 0.5 if name == "sgd" else 1e-2
    usual = {"learning_rate": rate, "weight_decay": 0.1, "schedule": "constant", "warmup": 0}
    module = sft_module(optimizer=OptimizerConfig(**usual, algorithm=ALGORITHMS[name], layer_decay=0.8))
    data = sft_data(module, chats(16), packing=False, batch_size=2)
    saver = ModelCheckpoint(folder / name, every_n_train_steps=2, save_top_k=-1, filename="two")
    options = {"max_steps": max_steps, "max_epochs": -1, "enable_checkpointing": True, "gradient_clip_val": 1.0}
    run = trainer(folder, strategy=strategy, devices=1 if strategy == "auto" else 2, callbacks=[saver] if resume is None else [],
                  accumulate_grad_batches=accumulate, **options)
    run.fit(module, data, ckpt_path=resume)
    return {n: full(p.detach()).clone() for n, p in module.named_parameters()}


def sharded(folder, tensor_parallel=1):
    for name in ALGORITHMS:
        strategy = partial(FSDP2Strategy, tensor_parallel_size=tensor_parallel, process_group_backend="gloo")
        whole = fit(folder, name, strategy(), 2 * tensor_parallel)
        again = fit(folder, name, strategy(), 2 * tensor_parallel, resume=folder / name / "two.ckpt")
        assert all(torch.equal(again[n], value) for n, value in whole.items()), name
        torch.save(whole, folder / f"{name}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_shards_move_as_whole_weights_and_resume_to_the_bit(tmp_path, tensor_parallel):
    run_on_ranks(sharded, tmp_path, tensor_parallel)
    for name in ALGORITHMS:
        alone = fit(tmp_path / "alone", name, "auto", 4)
        for n, value in torch.load(tmp_path / f"{name}.pt").items():
            print(name, n, (value - alone[n]).abs().max(), alone[n].abs().max())
            torch.testing.assert_close(value, alone[n], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name} {n} {m}")
