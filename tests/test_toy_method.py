"""A method is a loss, a data module, a module and a YAML: with these alone it trains, resumes, exports and predicts."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lit_alignment.tools import estimate, export, inspect
from lit_alignment.trainer_cli import build
from tests.helpers import ROOT
from tests.toy_method.losses import focal_token_loss

CONFIG = "tests/toy_method/tiny.yaml"


def run(stage, folder, *options):
    place = f"--trainer.logger.init_args.save_dir={folder}"
    return build([stage, "--config", CONFIG, place, "--trainer.enable_progress_bar=false", *options], run=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, run("fit", folder)


def test_loss_is_cross_entropy_without_gamma_and_less_where_the_model_is_sure():
    logits, targets = torch.randn(5, 7), torch.arange(5)
    logps = logits.log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(focal_token_loss(logps, 0.0), cross_entropy(logits, targets, reduction="none"))
    sure, unsure = torch.tensor([0.9]).log(), torch.tensor([0.1]).log()
    torch.testing.assert_close(focal_token_loss(sure, 2.0), -(0.1**2) * sure)
    torch.testing.assert_close(focal_token_loss(unsure, 2.0), -(0.9**2) * unsure)


@pytest.mark.slow
def test_method_fits_with_every_callback(trained):
    _, cli = trained
    run_folder = Path(cli.trainer.log_dir)
    losses = [float(line["val/loss"]) for line in rows(run_folder / "metrics.csv") if line.get("val/loss")]
    assert losses[-1] < losses[0]
    assert (run_folder / "report.html").is_file() and (run_folder / "checkpoints/export/config.json").is_file()


@pytest.mark.slow
def test_method_resumes_with_the_same_losses(trained, tmp_path):
    _, cli = trained
    first = sorted(Path(cli.trainer.log_dir, "checkpoints").glob("*.ckpt"))[0]
    resumed = run("fit", tmp_path, f"--ckpt_path={first}")
    assert resumed.trainer.global_step == cli.trainer.global_step
    for name in ("train/loss", "val/loss"):
        torch.testing.assert_close(resumed.trainer.callback_metrics[name], cli.trainer.callback_metrics[name])


@pytest.mark.slow
def test_method_is_exported_and_predicts(trained, tmp_path):
    _, cli = trained
    checkpoint = cli.trainer.checkpoint_callback.best_model_path
    export.main([checkpoint, "--out", str(tmp_path / "export")])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    found = plain(input_ids=torch.arange(3, 20)[None]).logits
    assert found.shape[-1] == plain.config.vocab_size
    writer = [{"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(tmp_path / "out")}}]
    run("predict", tmp_path, f"--ckpt_path={checkpoint}", f"--trainer.callbacks={json.dumps(writer)}")
    lines = [json.loads(line) for line in (tmp_path / "out/greedy.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["q0", "q1", "q2"] and all(line["answers"] for line in lines)


@pytest.mark.slow
def test_tools_take_the_method(capsys):
    estimate.main(["--config", CONFIG])
    inspect.main(["--config", CONFIG])
    said = capsys.readouterr().out
    assert "parameters:" in said and "12 examples from 12 records" in said


def test_package_names_nothing_of_the_method():
    for path in (ROOT / "lit_alignment").rglob("*.py"):
        assert "toy_method" not in path.read_text() and "FocalModule" not in path.read_text()


def rows(path):
    lines = path.read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
