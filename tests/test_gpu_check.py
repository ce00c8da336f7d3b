"""benchmarks/gpu_check.py, on a CPU and a tiny model: that every run of it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check(out: Path, *sections: str) -> tuple[str, dict[str, dict[str, dict[str, object]]]]:
    """What a call prints, and all results in its folder."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", f"--out={out}", "--device=cpu", "--tiny", "--sections"]
    shown = subprocess.run([*command, *sections], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return shown, json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_sections_end_on_a_cpu_and_are_not_measured_twice(tmp_path: Path) -> None:
    """Each run gives a row; a second call measures what is not there yet, and lists what lacks its package."""
    _, first = check(tmp_path, "lora_8b", "profile", "loss")
    shown, results = check(tmp_path, "lora_8b", "profile", "lora_1b", "dpo", "loss")

    failed = {name: found for runs in results.values() for name, found in runs.items() if "failed" in found}
    assert not failed, failed
    assert {section: results[section] for section in first} == first
    assert "fit over the bare loop" in shown
    assert abs(sum(results["profile"]["bare loop"]["shares"].values()) - 1) < 1e-6
    losses = [round(found["loss"] / 256, 2) for found in results["loss"].values()]
    assert len(losses) == 4 and len(set(losses)) == 1
    skipped = [name for name, found in results["lora_1b"].items() if "skipped" in found]
    assert all(f"{name}: skipped" in shown for name in skipped)
    assert {"bare loop", "fit"} <= {name for name, found in results["lora_1b"].items() if found.get("tokens")}
