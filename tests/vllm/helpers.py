"""Runs of both engines on tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lit_alignment import PredictionWriter
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.vllm.predict import predict
from tests.helpers import trainer

FAST = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
SMALL = {"max_model_len": 512, "max_num_seqs": 8}


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The predictions of a file."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def trained(folder: Path, module: Any, data: Any, steps: int = 2) -> str:
    """A checkpoint after a few steps."""
    runner = trainer(folder, max_steps=steps, max_epochs=steps)
    runner.fit(module, data)
    runner.save_checkpoint(folder / "trained.ckpt")
    return str(folder / "trained.ckpt")


def by_transformers(folder: Path, module: Any, data: Any, checkpoint: str | None = None) -> Path:
    """Predictions of transformers."""
    writer = PredictionWriter(str(folder / "transformers"))
    trainer(folder, callbacks=[writer]).predict(module, data, return_predictions=False, ckpt_path=checkpoint)
    return folder / "transformers"


def by_vllm(folder: Path, module: Any, data: Any, checkpoint: str | None = None, **settings: Any) -> Path:
    """Predictions of vLLM."""
    runner: Trainer = trainer(folder, callbacks=[PredictionWriter(str(folder / "vllm"))])
    predict(module, data, runner, SMALL | settings, checkpoint)
    return folder / "vllm"


def same_answers(first: list[dict[str, Any]], second: list[dict[str, Any]], logprobs: bool = True) -> None:
    """Equal to the token, and in the same order."""
    assert [line["id"] for line in first] == [line["id"] for line in second] and first
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one["answers"], other["answers"], strict=True):
            given = a.pop("logprob", 0.0), b.pop("logprob", 0.0)
            assert a == b
            if logprobs:
                assert given[0] == pytest.approx(given[1], abs=1e-3)
