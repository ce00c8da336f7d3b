"""The command line as a user meets it: help, overrides, and one clear message for each mistake."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from lit_alignment.cli import TOOLS
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.trainer_cli import build
from tests.helpers import ROOT, chats, write_jsonl
from tests.helpers.commands import command, command_in_a_process

TINY = "configs/sft/tiny.yaml"


def test_help_answers_at_once_and_names_every_command():
    best = 9.0
    for _ in range(3):
        begin = time.perf_counter()
        result = command_in_a_process("--help")
        best = min(best, time.perf_counter() - begin)
    assert result.returncode == 0 and best < 0.5
    assert all(f"  {name} " in result.stdout for name in ("fit", "validate", "test", "predict", "fetch", "demo"))
    assert command("--version").stdout.startswith("lit-alignment 0.")


def test_help_of_a_tool_waits_for_no_library():
    ask = """
import sys
from lit_alignment.cli import TOOLS, main

for tool in TOOLS:
    main([tool, "--help"])
    print("loaded", tool, *({*sys.modules} & {"torch", "transformers", "datasets", "lightning", "numpy"}))
"""
    run = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    loaded = [line.split() for line in run.stdout.splitlines() if line.startswith("loaded ")]
    assert [line[1] for line in loaded] == [*TOOLS] and all(len(line) == 2 for line in loaded), loaded
    assert run.stdout.count("usage: lit-alignment") == len(TOOLS)


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    for arguments in (["--help"], ["doctor"], ["fit", "--help", "SFTModule"]):
        ask = [sys.executable, "-m", "lit_alignment", *arguments]
        with subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as run:
            run.stdout.close()
            said = run.stderr.read()
        assert run.returncode == 141 and said == b""


def test_unknown_command_names_the_nearest():
    result = command("predct")
    assert result.returncode == 2 and "did you mean 'predict'?" in result.stderr


CASES = {
    "trainer-key": (
        {"trainer": {"max_epoch": 3}},
        [],
        "unknown key 'max_epoch' in trainer. Did you mean 'max_epochs'?",
    ),
    "model-key": ({"model": {"init_args": {"label_smothing": 1}}}, [], "Did you mean 'label_smoothing'?"),
    "nested-key": ({"model": {"init_args": {"backbone": {"atention": "x"}}}}, [], "Did you mean 'attention'?"),
    "source-key": ({"data": {"init_args": {"train": [{"pth": "x"}]}}}, [], "Did you mean 'path'?"),
    "class": ({"model": {"class_path": "lit_alignment.SFTModul"}}, [], "Did you mean 'lit_alignment.SFTModule'?"),
    "top-level": ({"traner": {"max_epochs": 1}}, [], "unknown key 'traner'"),
    "command-line": ({}, ["--model.init_args.label_smothing=1"], "Did you mean 'label_smoothing'?"),
    "wrong-type": ({"trainer": {"max_epochs": "many"}}, [], "trainer.max_epochs"),
    "missing-model": ({"model": {"init_args": {"backbone": {"path": "./nowhere"}}}}, [], "./nowhere: no such model"),
    "missing-data": ({"data": {"init_args": {"train": [{"path": "no.jsonl"}]}}}, [], "no.jsonl: no such file"),
    "bad-value": ({"data": {"init_args": {"encoding": {"max_length": 1}}}}, [], "max_length is 1; use 2 or more"),
    "null": (
        {"model": {"init_args": {"optimizer": {"learning_rate": None}}}},
        [],
        "model.init_args.optimizer.learning_rate is null; give a value, or leave it out",
    ),
    "list-for-settings": (
        {"data": {"init_args": {"encoding": []}}},
        [],
        "data.init_args.encoding is a list, not settings by name",
    ),
    "list-for-optional-settings": (
        {"model": {"init_args": {"adapter": []}}},
        [],
        "mine.yaml:3: model.init_args.adapter is a list; expected settings of AdapterConfig.",
    ),
    "eager-packing": (
        {"model": {"init_args": {"backbone": {"attention": "eager"}}}},
        [],
        "eager attends across documents, so it cannot train packed rows. Use one of: auto, sdpa",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mistake_in_a_config_is_one_message_with_exit_code_2(name, tmp_path):
    change, arguments, words = CASES[name]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(change))
    result = command(
        "fit", "--config", TINY, "--config", str(path), f"--trainer.default_root_dir={tmp_path}", *arguments
    )
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2, result.stderr
    assert message.startswith("lit-alignment: error: ") and words in message
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_bad_record_stops_before_training_with_file_line_and_field(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(chats(1)[0]) + '\n{"messages": [{"role": "wizard", "content": "x"}]}\n')
    arguments = [f'--data.init_args.train=[{{"path": "{path}"}}]', f"--trainer.logger.init_args.save_dir={tmp_path}"]
    result = command("fit", "--config", TINY, *arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{path}:2: field 'messages[0].role' is 'wizard'. Use one of system, user, assistant" in result.stderr


def quick(tmp_path, **changes):
    """A config that trains for a moment into a folder of the test's own."""
    data = write_jsonl(tmp_path / "d.jsonl", chats(6, longest=5))
    config = yaml.safe_load((ROOT / TINY).read_text())
    config["trainer"] |= {"max_epochs": 1, "enable_progress_bar": False, "callbacks": [], "accumulate_grad_batches": 1}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "runs")
    for split in ("train", "val", "test", "predict"):
        config["data"]["init_args"][split] = [{"path": data}]
    for key, value in changes.items():
        config["trainer"][key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.slow
def test_json_config_overrides_and_print_config(tmp_path):
    config = quick(tmp_path)
    result = command("fit", "--config", config, "--trainer.max_epochs=7", "--print_config")
    printed = yaml.safe_load(result.stdout)
    assert printed["trainer"]["max_epochs"] == 7
    assert printed["model"]["init_args"]["optimizer"]["schedule"] == "cosine"


@pytest.mark.slow
def test_run_folder_holds_config_report_and_checkpoint_that_resumes(tmp_path):
    config = quick(tmp_path)
    assert command("fit", "--config", config).returncode == 0
    run = tmp_path / "runs/sft_tiny/version_0"
    assert {"config.yaml", "data_report.json", "checkpoints"} <= {path.name for path in run.iterdir()}
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    again = command("fit", "--config", str(run / "config.yaml"), "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}")
    assert again.returncode == 0 and "Restored all states" in again.stderr
    for name in ("validate", "test"):
        assert "loss" in command(name, "--config", config, f"--ckpt_path={checkpoint}").stdout


def test_list_takes_the_place_of_an_earlier_list(tmp_path):
    """Of as many items, which a parser would fill up from the earlier ones: from a file, and from the command line."""
    mine = "[{path: configs/sft/support/train.jsonl}]"
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{init_args: {{val: {mine}}}}}")
    for arguments in (["--config", str(file)], [f"--data.init_args.val={mine}"], ["--data.init_args.val", mine]):
        (source,) = build(["--config", TINY, *arguments]).datamodule.sources["val"]
        assert source == SourceConfig("configs/sft/support/train.jsonl"), arguments
    (source,) = build(["--config", TINY, "--data.init_args.encoding.max_length=200"]).datamodule.sources["val"]
    assert source.num_samples == 40  # what is not given stays


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger"])
def test_resumed_run_writes_into_the_folder_of_the_run_and_loses_nothing(tmp_path, kind):
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    logger = {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": {"save_dir": str(tmp_path / "runs")}}
    config = quick(tmp_path, callbacks=[saver], logger=logger, log_every_n_steps=1)
    assert command("fit", "--config", config).returncode == 0
    (run,) = (tmp_path / "runs").glob("*/version_0")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    last = str(run / "checkpoints/last.ckpt")
    result = command("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs=2")
    assert result.returncode == 0, result.stderr
    assert "resuming behind optimizer step 1, in epoch 1" in result.stderr
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    kept = {name: content for name, content in before.items() if name in ("metrics.csv", "config.yaml")}
    for name, content in kept.items():
        stem, _, suffix = name.rpartition(".")
        assert (run / f"{stem}.1.{suffix}").read_bytes() == content and (run / name).read_bytes() != content
    more = ["--trainer.logger.init_args.version=5", "--trainer.max_epochs=3"]
    result = command("fit", "--config", config, "--ckpt_path", last)
    assert result.returncode == 2 and "has 2 epochs behind it, and trainer.max_epochs is 1. Raise it" in result.stderr
    other = command("fit", "--config", config, "--ckpt_path", last, *more)
    assert other.returncode == 0 and {path.name for path in run.parent.iterdir()} == {"version_0", "version_5"}


@pytest.mark.slow
def test_last_checkpoint_that_is_not_there_is_refused(tmp_path):
    result = command("fit", "--config", quick(tmp_path), "--ckpt_path", "last")
    assert result.returncode == 2 and "--ckpt_path last: there is no last checkpoint where" in result.stderr
