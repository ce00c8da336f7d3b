"""Strategies that cannot train a model are refused before anything is started."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lit_alignment import DeepSpeedStrategy, FSDP2Strategy
from lit_alignment.distributed import fsdp2
from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import chats, rag_module, sft_data, sft_module, trainer
from tests.helpers.ranks import run_on_ranks


def under(strategy, module, fn="fit"):
    module._trainer = SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn=fn))
    return module


@pytest.mark.parametrize(
    ("strategy", "ours"),
    [(ModelParallelStrategy(), "FSDP2Strategy"), (LightningDeepSpeedStrategy(), "DeepSpeedStrategy")],
)
def test_lightnings_own_is_refused_with_ours(strategy, ours):
    with pytest.raises(ConfigError, match=f"use lit_alignment.{ours}"):
        under(strategy, sft_module()).configure_model()


def test_deepspeed_says_what_runs_on_a_cpu():
    with pytest.raises(ConfigError, match=r"DeepSpeed needs CUDA GPUs.*FSDP2Strategy"):
        DeepSpeedStrategy(accelerator=CPUAccelerator()).setup_environment()


def test_deepspeed_cannot_skip_a_step():
    module = sft_module(optimizer=OptimizerConfig(non_finite="skip"))
    with pytest.raises(ConfigError, match="non_finite: DeepSpeed's engine cannot skip"):
        under(DeepSpeedStrategy(), module).configure_model()


@pytest.mark.parametrize("strategy", [FSDP2Strategy(tensor_parallel_size=2), DeepSpeedStrategy(stage=3)])
def test_layers_are_not_compiled_where_hooks_or_ranks_take_them_apart(strategy):
    module = sft_module()
    module.backbone = BackboneConfig("configs/tiny", weights="random", compile=True)
    with pytest.raises(ConfigError, match="backbone.compile: not with tensor_parallel_size above 1, and not un"):
        under(strategy, module).configure_model()


@pytest.mark.parametrize("name", ["sequence_parallel_size", "tensor_parallel_size"])
def test_ranks_cannot_share_what_rag_trains_on(name):
    with pytest.raises(ConfigError, match=f"{name}: not for RAGModule yet"):
        under(FSDP2Strategy(**{name: 2}), rag_module(None)).configure_model()


def test_predict_is_refused_where_ranks_share_layers():
    with pytest.raises(ConfigError, match="tensor_parallel_size: not for predict"):
        under(FSDP2Strategy(tensor_parallel_size=2), sft_module(), "predict").configure_model()


@pytest.mark.parametrize("strategy", [FSDP2Strategy(), DeepSpeedStrategy(stage=3)], ids=["fsdp2", "zero3"])
def test_quantised_weights_are_not_split(strategy):
    module = under(strategy, sft_module(lora=True))
    module.backbone = replace(module.backbone, quantization="nf4")
    with pytest.raises(ConfigError, match=r"quantization: nf4 weights cannot be split .* Set trainer.strategy: ddp"):
        module.configure_model()


def offloaded(folder):
    """Train under offloading on one rank, then move the module to another device as if that were the GPU."""
    strategy = FSDP2Strategy(cpu_offload=True)
    module = sft_module(lora=True)
    run = trainer(folder, strategy=strategy, devices=1, max_steps=1)
    run.fit(module, sft_data(module, chats(4), packing=False, batch_size=4))
    expected = sft_module(lora=True)
    alone = trainer(folder, max_steps=1)
    alone.fit(expected, sft_data(expected, chats(4), packing=False, batch_size=4))
    names = ("train/loss", "train/grad_norm")
    found, wanted = ([float(each.callback_metrics[name]) for name in names] for each in (run, alone))
    assert found == pytest.approx(wanted, rel=1e-5)
    strategy.parallel_devices = [torch.device("meta")]
    strategy.model_to_device()
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert {b.device.type for b in module.buffers()} == {"meta"} and module.device.type == "meta"


def test_offloaded_shards_stay_in_the_memory_of_the_host(tmp_path):
    run_on_ranks(offloaded, tmp_path, ranks=1)


def test_norms_of_offloaded_gradients_are_summed_by_gloo():
    """NCCL knows no memory of the host."""
    strategy = FSDP2Strategy(cpu_offload=True)
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    strategy.parallel_devices = [torch.device("cuda", 0)]
    assert strategy._get_process_group_backend() == "cpu:gloo,cuda:nccl"
    strategy.cpu_offload = False
    assert strategy._get_process_group_backend() == "nccl"


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("layered", [True, False], ids=["layers", "whole"])
def test_gradients_of_fully_sharded_training_are_summed_in_float32(precision, layered, monkeypatch):
    """Under bf16-mixed weights are gathered in bfloat16, and nothing is cast otherwise."""
    policies = []

    def record(network, options=None, *_, **given):
        policies.append((options or given)["mp_policy"])

    monkeypatch.setattr(fsdp2, "shard_layers", record)
    monkeypatch.setattr(fsdp2, "fully_shard", record)
    strategy = FSDP2Strategy()
    strategy.precision_plugin = MixedPrecision(precision, "cpu") if precision == "bf16-mixed" else Precision()
    strategy._device_mesh = {"data_parallel": None}
    strategy.shard(nn.Linear(2, 2), layered)
    expected = (torch.bfloat16, torch.float32) if precision == "bf16-mixed" else (None, None)
    assert [(policy.param_dtype, policy.reduce_dtype) for policy in policies] == [expected]
