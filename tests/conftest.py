import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from transformers import AutoTokenizer

from tests.helpers import ROOT

torch.set_num_threads(1)  # tiny models gain nothing from more, and threads that wait for each other lose much


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Every test has its own cache, and runs from the root, as the README's commands do."""
    monkeypatch.setenv("LIT_ALIGNMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
