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

ALGORITHMS = {"muon": MuonWithAdamW, "sgd": partial(torch.optim.SGD, momentum=0.9)}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fit(folder, name, strategy, accumulate, resume=None):
    rate = 0.5 if name == "sgd" else 1e-3
    usual = {"learning_rate": rate, "weight_decay": 0.1, "schedule": "constant", "warmup": 0}
    module = sft_module(optimizer=OptimizerConfig(**usual, algorithm=ALGORITHMS[name], layer_decay=0.8))
    data = sft_data(module, chats(16), packing=False, batch_size=2)
    saver = ModelCheckpoint(folder / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(
        folder,
        strategy=strategy,
        devices=1 if strategy == "auto" else 2,
        callbacks=[saver] if resume is None else [],
        enable_checkpointing=resume is None,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
    )
    run.fit(module, data, ckpt_path=resume)
    return {n: full(p.detach()).clone() for n, p in module.named_parameters()}


def sharded(folder, tensor_parallel):
    """Two steps of four micro-batches, on both ranks together."""
    for name in ALGORITHMS:
        strategy = partial(FSDP2Strategy, tensor_parallel_size=tensor_parallel, process_group_backend="gloo")
        whole = fit(folder, name, strategy(), 2 * tensor_parallel)
        again = fit(folder, name, strategy(), 2 * tensor_parallel, resume=folder / name / "step=1.ckpt")
        assert all(torch.equal(again[n], value) for n, value in whole.items()), name
        torch.save(whole, folder / f"{name}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_shards_move_as_whole_weights_and_resume_to_the_bit(tmp_path, tensor_parallel):
    run_on_ranks(sharded, tmp_path, tensor_parallel)
    start = sft_module()
    start.load_model()
    # Muon orthogonalizes in bfloat16, which makes much of the last bits of a gradient.
    for name, share in {"muon": 0.05, "sgd": 1e-3}.items():
        alone, found = fit(tmp_path / "alone", name, "auto", 4), torch.load(tmp_path / f"{name}.pt")
        for each, value in start.named_parameters():
            moved = (alone[each] - value.detach()).norm()
            assert moved > 0 and (found[each] - alone[each]).norm() < share * moved, (name, each)


def check(strategy, algorithm):
    module = sft_module(optimizer=OptimizerConfig(schedule="constant", algorithm=algorithm))
    module._trainer = SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn="fit"))
    module.configure_model()


class EightBits(torch.optim.SGD):
    __module__ = "bitsandbytes.optim.adamw"


@pytest.mark.parametrize(
    ("strategy", "algorithm", "reason"),
    [
        (FSDP2Strategy(), ScheduleFreeAdamW, "shard ScheduleFreeAdamW: weights in shards cannot be averaged; use DDP"),
        (FSDP2Strategy(), torch.optim.Adafactor, "shard Adafactor: torch takes no means of columns"),
        (FSDP2Strategy(), EightBits, "shard EightBits: its kernels take whole tensors; use torchao"),
        (FSDP2Strategy(cpu_offload=True), MuonWithAdamW, "with cpu_offload the shards of a matrix cannot be gathered"),
        (DeepSpeedStrategy(), torch.optim.SGD, "DeepSpeed's engine makes one vector of many weights"),
    ],
)
def test_what_a_strategy_cannot_shard_is_refused_with_the_reason(strategy, algorithm, reason):
    with pytest.raises(ConfigError, match=reason):
        check(strategy, algorithm)
