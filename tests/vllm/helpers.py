"""Runs of both engines on tiny models."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lit_alignment import PredictionWriter
from lit_alignment.vllm.predict import predict
from tests.helpers import trainer

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
