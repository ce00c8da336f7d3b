"""Which commit of a model on the hub was trained over is written down, and holds."""

import json
from pathlib import Path

import pytest

from lit_alignment import SFTModule
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.cli import main
from lit_alignment.errors import CheckpointError
from lit_alignment.models.loading import BackboneConfig
from tests.helpers import base_model_folder
from tests.helpers.adapters import WEIGHTS, fit, module_with


def test_a_hub_model_s_commit_stands_in_checkpoint_and_export_and_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        base_model_folder(tmp_path / f"hub/models--org--name/snapshots/{commit}")
    main_branch = tmp_path / "hub/models--org--name/refs/main"
    main_branch.parent.mkdir()
    main_branch.write_text(commits[0])
    last = fit(tmp_path, module_with("org/name", WEIGHTS["lora"]))
    assert read_saved(Path(last)).backbone.revision == commits[0]
    assert main(["export", str(last), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["revision"] == commits[0]
    main_branch.write_text(commits[1])
    assert read_saved(tmp_path / "out").backbone.revision == commits[0]
    with pytest.raises(
        CheckpointError, match=f"revision {commits[0]}, not over .*{commits[1]}. Set model.backbone.path and rev"
    ):
        fit(tmp_path, module_with("org/name", WEIGHTS["lora"]), resume=last, epochs=3)
    pinned = SFTModule(BackboneConfig("org/name", revision=commits[0]), WEIGHTS["lora"])
    fit(tmp_path, pinned, resume=last, epochs=3)
