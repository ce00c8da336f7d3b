"""Two nodes under torchrun, one of which dies and is started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers import ROOT, chats, write_jsonl
from tests.helpers.commands import command


def configuration(folder: Path, checkpoints: str) -> str:
    """A run of a few dozen steps with a checkpoint at each, on CPU."""
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 12,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": str(folder / checkpoints),
                        "every_n_train_steps": 1,
                        "save_top_k": 3,
                        "monitor": "step",
                        "mode": "max",
                        "save_last": True,
                    },
                }
            ],
        },
        "model": {
            "class_path": "lit_alignment.SFTModule",
            "init_args": {"backbone": {"path": "configs/tiny", "weights": "random"}},
        },
        "data": {
            "class_path": "lit_alignment.SFTDataModule",
            "init_args": {
                "train": [{"path": write_jsonl(folder / "train.jsonl", chats(16))}],
                "encoding": {"max_length": 512},
                "packing": False,
                "batch_size": 2,
                "cache_dir": str(folder / "cache"),
            },
        },
    }
    path = folder / f"{checkpoints}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def workers(agent: int) -> list[int]:
    """Processes that an agent has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [pid for pid in map(int, children) if "lit_alignment" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.slow
def test_killed_node_is_started_again_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    whole = command(
        "fit",
        "--config",
        configuration(tmp_path, "whole"),
        "--trainer.accumulate_grad_batches",
        "2",
    )
    assert whole.returncode == 0, whole.stderr[-2000:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "NODES": "2", "DEVICES": "1", "PORT": port, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["bash", "configs/trainer/torchrun.sh", "--config", configuration(tmp_path, "nodes")]
    words += ["--trainer.strategy.class_path", "lightning.pytorch.strategies.DDPStrategy"]
    words += ["--trainer.strategy.init_args.process_group_backend", "gloo"]
    logs = [(tmp_path / f"{node}.txt").open("w") for node in (0, 1)]
    agents = [
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        for log in logs
    ]
    try:
        deadline = time.monotonic() + 500
        while len(list((tmp_path / "nodes").glob("*.ckpt"))) < 3:
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents)
            time.sleep(0.05)
        (victim,) = workers(agents[1].pid)
        os.kill(victim, signal.SIGKILL)
        assert [agent.wait(max(1, deadline - time.monotonic())) for agent in agents] == [0, 0]
    finally:
        for agent, log in zip(agents, logs, strict=True):
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            log.close()
    said = (tmp_path / "0.txt").read_text() + (tmp_path / "1.txt").read_text()
    # The nodes notice at different times, so their processes may need several attempts to find each other again.
    assert said.count("no checkpoint yet: starting") == 2 and said.count("resuming from") >= 2
    expected, found = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "nodes"))
    assert found["global_step"] == expected["global_step"] == 48
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-3, atol=1e-5)
