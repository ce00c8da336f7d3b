"""A killed run continues: no prompt is answered twice, and none is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.helpers import ROOT, chats, write_jsonl

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_killed_run_resumes(tmp_path, base):
    records = chats(60)
    config = {
        "model": {
            "class_path": "lit_alignment.SFTModule",
            "init_args": {"backbone": {"path": base}, "generation": {"greedy": {"max_new_tokens": 64}}},
        },
        "data": {
            "class_path": "lit_alignment.SFTDataModule",
            "init_args": {
                "predict": [{"path": write_jsonl(tmp_path / "asked.jsonl", records)}],
                "encoding": {"max_length": 512},
            },
        },
        "engine": "vllm",
        "vllm": {"max_model_len": 512, "max_num_seqs": 2},
        "trainer": {
            "callbacks": [
                {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(tmp_path / "out")}}
            ]
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lit_alignment", "predict", "--config", str(tmp_path / "config.yaml")]
    partial = tmp_path / "out/greedy.jsonl.partial0"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 5):
        assert first.poll() is None, first.stderr.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    with partial.open("ab") as file:
        file.write(b'{"id": "r')  # what a kill inside a write leaves
    before = [json.loads(line) for line in partial.read_text().splitlines()[:-1]]
    assert 5 <= len(before) < 60
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-2000:]
    assert f"{60 - len(before)} prompts," in second.stdout
    found = [json.loads(line) for line in (tmp_path / "out/greedy.jsonl").read_text().splitlines()]
    assert [line["id"] for line in found] == [record["id"] for record in records]
    kept = {line["id"]: line for line in found}
    assert all(kept[line["id"]] == line for line in before)
    assert not partial.exists()
