"""Runs of both engines on tiny models."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lit_alignment import PredictionWriter
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.vllm.predict import predict
from tests.helpers import ROOT, trainer

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


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[str]:
    """A server on a free port, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "lit_alignment", "serve", *arguments, "--port", str(port), "--max-model-len", "512"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | variables
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, process.stdout.read()[-3000:]
            assert time.monotonic() < deadline
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
