"""Strategies that cannot train a model are refused before anything is started."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_alignment import DeepSpeedStrategy, FSDP2Strategy
from lit_alignment.errors import ConfigError
from lit_alignment.models.tokens import NewToken, TokensConfig
from tests.helpers import rag_module, sft_module


def under(strategy, module, fn="fit"):
    module._trainer = SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn=fn))
    return module


@pytest.mark.parametrize(
    ("strategy", "ours"),
    [(ModelParallelStrategy(), "FSDP2Strategy"), (LightningDeepSpeedStrategy(), "DeepSpeedStrategy")],
)
def test_lightnings_own_is_refused_with_ours(strategy, ours):
    module = sft_module()
    with pytest.raises(ConfigError, match=f"use lit_alignment.{ours}"):
        under(strategy, module).shard(module)


def test_deepspeed_says_what_runs_on_a_cpu():
    with pytest.raises(ConfigError, match=r"DeepSpeed needs CUDA GPUs.*FSDP2Strategy"):
        DeepSpeedStrategy(accelerator=CPUAccelerator()).setup_environment()


def test_stage_3_refuses_new_tokens_beside_adapters():
    module = sft_module(lora=True, tokens=TokensConfig(new={"<new>": NewToken()}))
    model = module.load_model()
    under(DeepSpeedStrategy(stage=2), module)._check_sharing(model, True)
    with pytest.raises(ConfigError, match="stage 3 has no place for new tokens"):
        under(DeepSpeedStrategy(stage=3), module)._check_sharing(model, True)


@pytest.mark.parametrize("name", ["sequence_parallel_size", "tensor_parallel_size"])
def test_ranks_cannot_share_what_rag_trains_on(name):
    module = rag_module(None)
    with pytest.raises(ConfigError, match=f"{name}: not for RAGModule yet"):
        under(FSDP2Strategy(**{name: 2}), module)._check_sharing(module, True)


def test_predict_is_refused_where_ranks_share_layers():
    module = sft_module()
    with pytest.raises(ConfigError, match="tensor_parallel_size: not for predict"):
        under(FSDP2Strategy(tensor_parallel_size=2), module, "predict")._check_sharing(module, True)
