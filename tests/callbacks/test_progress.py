"""Lines where there is no terminal, and a bar that ends where the run ends."""

import re

import pytest

from lit_alignment import Throughput
from lit_alignment.callbacks.progress import Bar, ModelSize, ProgressLines
from tests.helpers import chats, sft_data, sft_module, trainer
from tests.helpers.commands import command


def fit(folder, callbacks, **settings):
    module = sft_module()
    data = sft_data(module, chats(8), chats(2, seed=1), packing=False, batch_size=1)
    run = trainer(folder, callbacks=callbacks, enable_progress_bar=True, **settings)
    run.fit(module, data)
    return run


def test_lines_tell_step_epoch_loss_speed_and_time_left(tmp_path, capsys):
    fit(tmp_path, [Throughput(every_n_steps=1), ProgressLines()], log_every_n_steps=2, accumulate_grad_batches=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(",")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert re.fullmatch(r"step 2/4, epoch 1, loss [\d.]+, \d+ tokens/s, 0:0\d left", lines[0])


@pytest.mark.parametrize(("settings", "said"), [({}, "8 optimizer steps in all"), ({"max_steps": 2}, None)])
def test_training_of_few_steps_is_told_unless_they_were_asked_for(tmp_path, settings, said, monkeypatch):
    lines = []
    monkeypatch.setattr("lit_alignment.callbacks.progress.rank_zero_info", lines.append)
    fit(tmp_path, [ModelSize()], **settings)
    assert lines[0].startswith("parameters: ")
    assert [line.partition(",")[0] for line in lines[1:]] == ([said] if said else [])


def test_only_one_rank_speaks(tmp_path, capsys):
    lines = ProgressLines()
    lines.disable()
    fit(tmp_path, [lines], log_every_n_steps=1)
    assert "step" not in capsys.readouterr().out


def test_run_without_an_end_names_none(tmp_path, capsys):
    module = sft_module()
    data = sft_data(module, chats(4), packing=False, batch_size=1)
    callbacks = [ProgressLines()]
    settings = {"max_epochs": -1, "max_time": {"seconds": 1}, "log_every_n_steps": 1}
    trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True, **settings).fit(module, data)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 1, epoch 1, loss [\d.]+", next(line for line in lines if line.startswith("step")))


@pytest.mark.parametrize(("steps", "batches", "epochs"), [(2, 4, 1), (3, 6, 2), (4, 8, 1), (-1, 8, 1)])
def test_bar_ends_at_max_steps(tmp_path, steps, batches, epochs):
    totals = []

    class Seen(Bar):
        def on_train_batch_end(self, trainer, *rest) -> None:
            super().on_train_batch_end(trainer, *rest)
            totals.append(self.total_train_batches)

    fit(tmp_path, [Seen()], max_steps=steps, max_epochs=epochs, accumulate_grad_batches=2)
    assert set(totals) == {batches}, totals


def test_bar_without_a_last_epoch_names_none(tmp_path):
    bar = Bar()
    run = fit(tmp_path, [bar], max_epochs=-1, max_steps=2)
    assert bar._get_train_description(0).strip() == "Epoch 1"
    run.fit_loop.max_epochs = 4
    assert bar._get_train_description(0).strip() == "Epoch 1/4"


def test_command_without_a_terminal_says_lines_and_why_it_ended(tmp_path):
    changes = ["--trainer.max_steps=2", "--trainer.max_epochs=-1", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    result = command("fit", "--config", "configs/sft/tiny.yaml", "--trainer.limit_val_batches=1", *changes)
    assert result.returncode == 0, result.stderr
    assert [line.split(",")[0] for line in result.stdout.splitlines() if line.startswith("step")] == [
        "step 1/2",
        "step 2/2",
    ]
    assert "validation: loss " in result.stdout
    assert "trainer.max_steps: 2 is reached (optimizer step 2, epoch 1).\nfinal: train/loss " in result.stderr
    assert "\nbest: val/loss " in result.stderr and "\nNext:\n  lit-alignment predict" in result.stderr
    assert "parameters: 172 K (model 172 K), 172 K of them trained\n" in result.stderr
    alarms = ("resumable", "eval mode at", "ranks is zero", "Epoch 0/-2", "Setting accelerator", "Encoding", "TPU")
    for alarm in (*alarms, "FLOPs", "summary callbacks", "Loading weights"):
        assert alarm not in result.stdout + result.stderr
