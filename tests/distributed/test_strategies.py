"""Strategies that cannot train a model are refused before anything is started."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_alignment import DeepSpeedStrategy, FSDP2Strategy
from lit_alignment.errors import ConfigError
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import rag_module, sft_module


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


@pytest.mark.parametrize("name", ["sequence_parallel_size", "tensor_parallel_size"])
def test_ranks_cannot_share_what_rag_trains_on(name):
    with pytest.raises(ConfigError, match=f"{name}: not for RAGModule yet"):
        under(FSDP2Strategy(**{name: 2}), rag_module(None)).configure_model()


def test_predict_is_refused_where_ranks_share_layers():
    with pytest.raises(ConfigError, match="tensor_parallel_size: not for predict"):
        under(FSDP2Strategy(tensor_parallel_size=2), sft_module(), "predict").configure_model()
