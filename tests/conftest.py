import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from more, and threads that wait for each other lose much; also in what tests start.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]  # nothing heavy is imported here: the process that only distributes tests would wait


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Of torch in this process; a plugin may have loaded its thread pool before the variables above were set."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_hub():
    """No request to the hub from this process, in which a plugin imports its client before the variable is set."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Every test has its own cache, runs from the root, as the README's commands do, and leaves log levels alone."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    monkeypatch.setenv("LIT_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _gpu(request):
    """Tests that need a GPU are skipped without one, with the reason."""
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU here")


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "configs/tiny")


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled yet, and nothing stays; the counters of what is compiled are at zero."""
    import torch
    from torch._dynamo.utils import counters

    from lit_alignment.models.layers import _compiled

    def forget():
        _compiled.cache_clear()
        torch._dynamo.reset()
        counters.clear()

    forget()
    yield
    forget()


@pytest.fixture
def without_kernels(fresh_compiler, monkeypatch):
    """Programs are traced and split as always, but run by PyTorch's own kernels, which need no C++ compiler."""
    import torch

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
