"""Engines in the tests' own process, which start in seconds."""

import pytest

from tests.helpers import base_model_folder


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def base(tmp_path):
    """A tiny base model whose heads are as wide as vLLM's attention on CPU needs them."""
    return base_model_folder(tmp_path / "base", num_attention_heads=2, num_key_value_heads=1, head_dim=32)
