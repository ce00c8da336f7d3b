"""The folder of a run: taken by one run alone, known to all ranks, gone if nothing was written."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lit_alignment.callbacks.run_folder import RunFolder, leave_no_folder
from lit_alignment.cli import main
from lit_alignment.errors import ConfigError
from tests.helpers import ROOT, chats, sft_data, sft_module, trainer, write_jsonl
from tests.helpers.commands import command
from tests.helpers.ranks import run_on_ranks

KINDS = [CSVLogger, TensorBoardLogger]


@pytest.fixture
def config(tmp_path):
    """A training of two steps, with the default logger and checkpoints beside it."""
    model = {"backbone": {"path": "configs/tiny", "weights": "random"}}
    data = {"train": [{"path": write_jsonl(tmp_path / "train.jsonl", chats(8))}], "packing": False, "batch_size": 2}
    settings = {
        "accelerator": "cpu",
        "max_steps": 2,
        "log_every_n_steps": 1,
        "default_root_dir": str(tmp_path / "runs"),
    }
    settings |= {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "runs")}},
    }
    found = {
        "trainer": settings,
        "model": {"class_path": "lit_alignment.SFTModule", "init_args": model},
        "data": {"class_path": "lit_alignment.SFTDataModule", "init_args": data},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(found))
    return str(path)


def versions(tmp_path):
    return sorted(path.name for path in (tmp_path / "runs/lightning_logs").iterdir())


def take(folder, *loggers):
    found = RunFolder()
    found.take(trainer(folder, logger=list(loggers)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_have_seen_the_same_folders_take_different_ones(tmp_path, monkeypatch, kind):
    loggers = [kind(tmp_path, name="run") for _ in range(3)]
    monkeypatch.setattr(kind, "_get_next_version", lambda self: 0)  # what each has seen before the others began
    for logger in loggers:
        take(tmp_path, logger)
    assert [logger.version for logger in loggers] == [0, 1, 2]
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["version_0", "version_1", "version_2"]


def test_loggers_of_one_run_share_its_folder(tmp_path):
    loggers = [kind(tmp_path, name="run") for kind in KINDS]
    take(tmp_path, *loggers)
    assert [logger.version for logger in loggers] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [4, "mine"])
def test_given_version_stays(tmp_path, kind, version):
    logger = kind(tmp_path, name="run", version=version)
    take(tmp_path, logger)
    assert logger.version == version and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_run_takes_the_folder_in_which_everything_is_written(config, tmp_path):
    for number in range(2):
        assert command("fit", "--config", config).returncode == 0
        assert versions(tmp_path) == [f"version_{each}" for each in range(number + 1)]
        run = tmp_path / f"runs/lightning_logs/version_{number}"
        left = {path.name for path in run.iterdir()}
        assert {"checkpoints", "config.yaml", "metrics.csv", "report.html", "data_report.json"} <= left
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch=0-step=2.ckpt"]
    resumed = command("fit", "--config", config, "--ckpt_path=newest", "--trainer.max_steps=3")
    assert resumed.returncode == 0 and versions(tmp_path) == ["version_0", "version_1"]
    assert (tmp_path / "runs/lightning_logs/version_1/metrics.1.csv").exists()


def test_run_that_does_not_begin_leaves_no_folder(config, tmp_path):
    unlogged = [{"class_path": "EarlyStopping", "init_args": {"monitor": "train/los"}}]  # noticed after the first step
    late = command("fit", "--config", config, f"--trainer.callbacks={json.dumps(unlogged)}")
    assert late.returncode == 2 and versions(tmp_path) == ["version_0"]
    shutil.rmtree(tmp_path / "runs")
    unlogged[0]["init_args"]["monitor"] = "val/los"
    validated = ["--data.val", json.dumps([{"path": str(tmp_path / "train.jsonl")}])]
    result = command("fit", "--config", config, f"--trainer.callbacks={json.dumps(unlogged)}", *validated)
    assert result.returncode == 2 and "Did you mean 'val/loss'?" in result.stderr
    (tmp_path / "train.jsonl").write_text("no JSON\n")
    assert command("fit", "--config", config).returncode == 2
    assert versions(tmp_path) == []


def test_what_a_failed_start_did_not_write_stays(tmp_path):
    folder = take(tmp_path, CSVLogger(tmp_path, name="run"))
    (tmp_path / "run/version_0/memory.pickle").touch()
    folder.leave(failed=True)
    assert (tmp_path / "run/version_0/memory.pickle").exists()


def test_predict_reports_beside_its_answers_and_leaves_no_folder_of_a_run(config, tmp_path):
    asked = ["--data.predict", json.dumps([{"path": str(tmp_path / "train.jsonl"), "num_samples": 2}])]
    writer = [{"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(tmp_path / "out")}}]
    asked += [f"--trainer.callbacks={json.dumps(writer)}", "--model.generation={greedy: {max_new_tokens: 2}}"]
    result = command("predict", "--config", config, *asked)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "runs").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"data_report.json", "greedy.jsonl"}


def test_validation_and_test_note_figures_in_the_run_of_the_checkpoint_and_leave_no_folder(config, tmp_path):
    records = json.dumps([{"path": str(tmp_path / "train.jsonl")}])
    asked = ["--config", config, f"--data.val={records}", f"--data.test={records}", "--trainer.limit_val_batches=1"]
    model = command("test", *asked)
    assert model.returncode == 0 and "figures" not in model.stderr and not (tmp_path / "runs").exists()
    assert command("fit", *asked).returncode == 0
    run = tmp_path / "runs/lightning_logs/version_0"
    (run / "test.jsonl").write_text("of an earlier test\n")
    before = {path: path.read_text() for path in run.iterdir() if path.is_file()}
    for name in ("test", "validate"):
        result = command(name, *asked, "--ckpt_path=newest")
        assert result.returncode == 0 and f"figures: {run / name}.jsonl" in result.stderr, result.stderr
    assert versions(tmp_path) == ["version_0"] and not Path("data_report.json").exists()
    assert before.pop(run / "test.jsonl") == (run / "test.jsonl").read_text().splitlines(keepends=True)[0]
    assert {path: path.read_text() for path in before} == before
    line = json.loads((run / "test.jsonl").read_text().splitlines()[1])
    assert line["checkpoint"] == "epoch=0-step=2.ckpt" and line["data"]["test"]["examples"] == 8
    assert line["figures"]["test/loss"] > 0
    assert json.loads((run / "validate.jsonl").read_text())["figures"]["val/loss"] > 0


def test_logger_with_a_version_of_its_own_and_others_keep_what_is_measured(tmp_path):
    loggers = [CSVLogger(tmp_path, name="run"), CSVLogger(tmp_path, version="mine"), DummyLogger()]
    runner, data = trainer(tmp_path, logger=loggers), sft_data(sft_module(), chats(2))
    leave_no_folder(runner, data)
    assert runner.loggers == loggers[1:] and data.writes_reports
    runner.loggers = [loggers[0], loggers[2]]
    leave_no_folder(runner, data)
    assert runner.loggers == loggers[2:] and not data.writes_reports


def test_second_run_says_that_the_first_is_there_and_how_to_go_on_with_it(config, tmp_path):
    checkpoint = tmp_path / "runs/lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()  # it is not read
    (tmp_path / "train.jsonl").write_text("no JSON\n")
    result = command("fit", "--config", config)
    assert f"An earlier run of this name has left {checkpoint}. This run starts anew; to go on" in result.stderr


@pytest.mark.slow
def test_folder_that_cannot_be_made_is_one_message(config, tmp_path):
    (tmp_path / "runs").write_text("")
    result = command("fit", "--config", config)
    assert result.returncode == 2
    assert (
        "runs/lightning_logs: cannot be written (Not a directory). Free its disk, or set trainer.default"
        in result.stderr
    )
    with pytest.raises(ConfigError, match="cannot be written"):
        take(tmp_path, TensorBoardLogger(tmp_path / "runs"))


def run_alone(config):
    """As a process that no launcher has started."""
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    rank_zero_only.rank = 0
    assert main(["fit", "--config", config]) == 0


@pytest.mark.slow
def test_processes_that_start_together_share_nothing(config, tmp_path):
    run_on_ranks(run_alone, config)
    assert versions(tmp_path) == [f"version_{number}" for number in range(2)]
    for name in versions(tmp_path):
        with (tmp_path / f"runs/lightning_logs/{name}/metrics.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file)].count("0") == 1
        assert len(list((tmp_path / f"runs/lightning_logs/{name}/checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_ranks_write_into_the_folder_of_the_first(config, tmp_path):
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"process_group_backend": "gloo"},
    }
    run = [sys.executable, "-m", "lit_alignment", "fit", "--config", config, "--trainer.devices=2"]
    result = subprocess.run(
        [*run, f"--trainer.strategy={json.dumps(strategy)}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert versions(tmp_path) == ["version_0"]
