"""What runs on a GPU (`-m gpu`); where a path exists on a CPU its test runs there too, as a slow one."""

import pytest


@pytest.fixture
def _one_process_group(monkeypatch):
    """A strategy of one rank in the tests' own process, of which nothing stays."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.setenv(name, "0")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def base(tmp_path):
    """A tiny base model with heads as wide as kernels for GPUs take them."""
    from tests.helpers import base_model_folder

    return base_model_folder(tmp_path / "base", num_attention_heads=2, num_key_value_heads=1, head_dim=32)
