"""Every YAML under configs/ is valid; the tiny ones run every stage."""

import json
from pathlib import Path

import pytest
import yaml

from lit_alignment.tools import index
from lit_alignment.trainer_cli import AlignmentCLI, build
from tests.helpers import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in CONFIGS if path.parent.name in ("adapters", "optimizers", "trainer")]
TINY = [path for path in CONFIGS if path.name.startswith("tiny")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_parses_and_opens_with_what_to_expect(path, monkeypatch, tmp_path):
    if path.stem == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    head = path.read_text().split("\nseed_everything")[0].split("\nmodel:")[0].split("\ntrainer:")[0]
    assert all(word in head for word in ("# Purpose:", "# Command:", "# Needs:", "# Expect:"))
    monkeypatch.setattr(AlignmentCLI, "instantiate_classes", lambda self: None)
    below = ["--config", "configs/sft/smollm2_lora.yaml"] if path in OVERLAYS else []
    config = build([*below, "--config", str(path)]).config
    assert config.model.class_path.startswith("lit_alignment.")
    assert config.data.class_path.removesuffix("DataModule") == config.model.class_path.removesuffix("Module")


# Metric, its bound (a reward is above it, others are below), name of the predictions file, what each line has.
EXPECTED = {
    "sft": ("val/loss", 2.5, "greedy", "answers"),
    "classification": ("val/loss", 1.5, "classes", "probabilities"),
    "reward": ("val/loss", 0.5, "rewards", "rewards"),
    "preference": ("val/sigmoid_loss", 0.3, "greedy", "answers"),
    "distillation": ("val/kl", 0.006, "greedy", "answers"),
    "tiny_kto": ("val/loss", 0.3, "greedy", "answers"),
    "policy": ("train/reward", 1.4, "greedy", "answers"),  # of 2; 0.8 before
    "rag": ("val/loss", 1.0, "greedy", "doc_scores"),
    "vlm": ("val/loss", 0.8, "greedy", "answers"),  # of colors and shapes that were never together in training
}


def prepare_rag(model: dict, path: Path, folder: Path) -> None:
    """What stands before the fit in the config's commands, in a folder of the test."""
    places = [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.enable_progress_bar=false"]
    build(["fit", "--config", str(path.with_name("reader.yaml")), *places], run=True)
    model["backbone"]["path"] = str(folder / "rag_reader/checkpoints/export")
    model["index"]["path"] = str(folder / "index")
    settings = [f"--model.init_args.index.path={folder / 'index'}"]
    backbone = [f"--model.init_args.backbone.path={model['backbone']['path']}"]
    index.main(["build", "--config", str(path), *settings, *backbone])


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=lambda path: str(path.relative_to(ROOT)))
def test_tiny_config_runs_every_stage(path, tmp_path):
    metric, bound, name, field = EXPECTED.get(path.stem) or EXPECTED[path.parent.name]
    config = yaml.safe_load(path.read_text())
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    config["trainer"]["enable_progress_bar"] = False
    changed = tmp_path / "config.yaml"
    if path.parent.name == "rag":
        prepare_rag(config["model"]["init_args"], path, tmp_path)
    changed.write_text(yaml.safe_dump(config))
    cli = build(["fit", "--config", str(changed)], run=True)
    reached = float(cli.trainer.callback_metrics[metric])
    assert reached > bound if metric.endswith("reward") else reached < bound
    if path.parent.name == "rag":  # from random weights, each of the 8 products' passages ranks first, however asked
        assert float(cli.trainer.callback_metrics["val/recall@1"]) == 1
    checkpoint = cli.trainer.checkpoint_callback.best_model_path
    run = Path(cli.trainer.log_dir)
    assert (run / "report.html").is_file() and (run / "checkpoints/export/model.safetensors").is_file()
    for stage in ("validate", "test"):
        build([stage, "--config", str(changed), f"--ckpt_path={checkpoint}"], run=True)
    writer = [{"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(tmp_path / "out")}}]
    predicted = build(
        ["predict", "--config", str(changed), f"--ckpt_path={checkpoint}", f"--trainer.callbacks={json.dumps(writer)}"],
        run=True,
    )
    lines = [json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]
    assert len(lines) == len(predicted.datamodule.examples["predict"]) >= 8 and all(line[field] for line in lines)
