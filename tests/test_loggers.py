"""Metrics and tables in the loggers that a run can have."""

import csv
import json
import sys
import zipfile

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lit_alignment import CherryPicks
from lit_alignment.callbacks.samples.loggers import log_table
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.loggers import ClearMLLogger
from lit_alignment.trainer_cli import build
from tests.helpers import chats, sft_data, sft_module, trainer
from tests.helpers.ranks import run_on_ranks


def fit(folder, logger):
    module = sft_module(lora=True)
    picks = CherryPicks(num_samples=2, generation=DecodingConfig(max_new_tokens=3))
    runner = trainer(folder, callbacks=[picks], logger=logger, max_epochs=2, log_every_n_steps=1)
    runner.fit(module, sft_data(module, chats(6), chats(5, seed=1)))
    return runner


@pytest.mark.slow
def test_several_loggers_take_metrics_and_tables(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb = WandbLogger(save_dir=tmp_path, offline=True, project="p")
    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv"), wandb]
    runner = fit(tmp_path, loggers)
    wandb.experiment.finish()
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    assert len(events.Scalars("val/loss")) == 2 and len(events.Tensors("cherry_picks/text_summary")) == 3
    with open(f"{loggers[1].log_dir}/metrics.csv") as file:
        logged = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert logged[-1] == pytest.approx(float(runner.callback_metrics["val/loss"]))
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")]
    assert len(tables) == 3 and tables[0]["columns"][:3] == ["prompt", "reference", "answer"]


def test_table_reaches_mlflow_with_its_steps(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("p", tracking_uri=f"file:{tmp_path}/mlruns")
    runner = fit(tmp_path, logger)
    history = logger.experiment.get_metric_history(logger.run_id, "val/loss")
    assert history[-1].value == pytest.approx(float(runner.callback_metrics["val/loss"])) and len(history) == 2
    (path,) = (tmp_path / "mlruns").rglob("cherry_picks.json")
    table = json.loads(path.read_text())
    assert table["columns"][:4] == ["step", "prompt", "reference", "answer"]
    steps = [row[0] for row in table["data"]]
    assert len(steps) == 6 and steps == sorted(steps) and len(set(steps)) == 3


def fit_with_clearml(folder):
    logger = ClearMLLogger("project", "task", tags=["tag"], offline=True, save_dir=str(folder))
    logger.log_hyperparams({"learning_rate": 0.125})
    fit(folder, logger)


@pytest.mark.slow
def test_metrics_settings_and_table_reach_clearml_offline(tmp_path, monkeypatch):
    """In a process of its own: ClearML changes much of the interpreter that it runs in."""
    pytest.importorskip("clearml")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "clearml"))
    run_on_ranks(fit_with_clearml, tmp_path, ranks=1)
    (session,) = (tmp_path / "clearml").rglob("offline-*.zip")
    with zipfile.ZipFile(session) as archive:
        task = archive.read("task.json").decode()
        lines = archive.read("metrics.jsonl").decode().splitlines()
    events = [event for line in lines for event in json.loads(line)]
    assert {("val", "loss"), ("train", "loss")} <= {(event["metric"], event["variant"]) for event in events}
    tables = [event for event in events if event["metric"] == "cherry_picks"]
    assert len({event["iter"] for event in tables}) == 3 and "prompt" in str(tables[0])
    assert json.loads(task)["name"] == "task" and '"tag"' in task and "0.125" in task


def test_missing_clearml_is_one_message_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "clearml", None)
    with pytest.raises(ConfigError, match=r"clearml is not installed. Run: pip install 'lit-alignment\[clearml\]'"):
        fit(tmp_path, ClearMLLogger("project", "task", save_dir=str(tmp_path)))


class NoFolder(CSVLogger):
    """As a logger that writes to a server only."""

    save_dir = None


def test_first_logger_without_a_folder_is_refused(tmp_path):
    arguments = ["--config", "configs/sft/tiny.yaml", "--trainer.callbacks=[]"]
    logger = {"class_path": "tests.test_loggers.NoFolder", "init_args": {"save_dir": str(tmp_path)}}
    with pytest.raises(ConfigError, match="NoFolder gives the run no folder on this disk. Make it a list"):
        build([*arguments, f"--trainer.logger={json.dumps(logger)}"])
    build([*arguments, f"--trainer.logger={json.dumps(logger)}", "--trainer.fast_dev_run=true"])


def test_logger_without_tables_is_passed_over(tmp_path):
    log_table([CSVLogger(tmp_path)], "picks", ["a"], [["x"]], 1)
    assert not list(tmp_path.iterdir())
