"""The end of a training saves its last step, and says why it ended, its figures, and what comes next."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import CSVLogger

from lit_alignment.callbacks.summary import EndSummary, _final, ending, why_ended
from lit_alignment.modules.preference import PreferenceModule
from tests.helpers import chats, pairs, reward_data, reward_model, sft_data, sft_module, trainer


def fit(folder, *callbacks, resume=None, **settings):
    module = sft_module()
    data = sft_data(module, chats(8), chats(4, seed=1), packing=False, batch_size=1)
    run = trainer(folder, callbacks=[*callbacks], enable_checkpointing=bool(callbacks), **settings)
    run.fit(module, data, ckpt_path=resume)
    return run


def test_early_stopping_is_named_with_the_best_step_and_the_command(tmp_path):
    saver = ModelCheckpoint(tmp_path / "some where", monitor="val/loss")
    stopper = EarlyStopping("val/loss", min_delta=1e6, patience=1)
    logger = CSVLogger(tmp_path / "a run", name="n")
    run = fit(tmp_path, saver, stopper, max_epochs=9, logger=logger)
    config = tmp_path / "a run/n/version_0/config.yaml"
    config.write_text("")
    first, *lines = ending(run, why_ended(run)).split("\n")
    assert first.startswith("early stopping: ") and "did not improve in the last 1 records" in first
    assert f"(optimizer step 16, epoch {run.current_epoch})" in first
    values = {name: float(run.callback_metrics[name]) for name in ("train/loss", "val/loss")}
    assert lines[0].startswith(f"final: train/loss {values['train/loss']:.4g}, val/loss {values['val/loss']:.4g}, ")
    step = saver.best_model_path.rpartition("step=")[2].removesuffix(".ckpt")
    best = f"best: val/loss {float(saver.best_model_score):.4g} at step {step}, '{saver.best_model_path}'"
    assert lines[1:] == [
        best,
        f"run: '{config.parent}'  (config.yaml, data_report.json)",
        f"To go on: raise EarlyStopping's patience (1) in '{config}', then lit-alignment fit --config '{config}' "
        f"--ckpt_path '{saver.best_model_path}'",
    ]


def test_figures_stand_in_the_order_of_the_methods_charts():
    module = sft_module()
    module.charts = PreferenceModule.charts
    logged = ("val/chosen_logp", "val/margin", "val/loss", "val/kl", "train/loss", "val/accuracy", "val/z", "train/kl")
    run = SimpleNamespace(callback_metrics={name: torch.tensor(2.0) for name in logged}, lightning_module=module)
    assert _final(run) == "train/loss 2, val/loss 2, val/accuracy 2, val/margin 2, val/chosen_logp 2, val/kl 2"


def test_a_limit_that_is_reached_is_raised_in_the_command(tmp_path):
    run = fit(tmp_path, ModelCheckpoint(tmp_path), max_steps=4, max_epochs=-1)
    first, *_, last = ending(run, why_ended(run)).split("\n")
    assert (first, last) == (
        "trainer.max_steps: 4 is reached (optimizer step 4, epoch 1).",
        f"To go on: lit-alignment fit --config ... --ckpt_path {tmp_path}/epoch=0-step=4.ckpt --trainer.max_steps 8",
    )
    run = fit(tmp_path, ModelCheckpoint(tmp_path, filename="x"), max_epochs=1)
    assert why_ended(run) == "trainer.max_epochs: 1 is reached"
    assert ending(run, "interrupted").endswith(f"--ckpt_path {tmp_path}/x.ckpt --trainer.max_epochs 2")


def test_a_limit_of_nothing_is_said(tmp_path):
    assert why_ended(fit(tmp_path, max_epochs=0)) == "nothing was trained, as trainer.max_epochs is 0"


def test_a_limit_of_time_is_named_and_raised(tmp_path):
    run = fit(tmp_path, ModelCheckpoint(tmp_path, filename="x"), max_epochs=-1, max_time="00:00:00:01")
    assert ending(run, why_ended(run)).startswith("trainer.max_time is reached")
    assert ending(run, why_ended(run)).endswith("x.ckpt --trainer.max_time 00:00:00:02")


def test_without_a_checkpoint_no_command_is_given(tmp_path):
    run = fit(tmp_path, max_epochs=1)
    said = ending(run, "interrupted")
    assert said.startswith("interrupted (optimizer step 8, epoch 1).\nfinal: ") and "lit-alignment" not in said
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=100)
    assert ending(fit(tmp_path, saver), "interrupted").endswith("\nNo checkpoint was saved.")


def test_last_step_is_saved_whatever_the_interval_of_saving(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, saver, EndSummary(), max_steps=5, max_epochs=-1, limit_val_batches=0)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=0-step=3.ckpt", "epoch=0-step=5.ckpt"}


@pytest.mark.parametrize(("interval", "steps"), [(1.0, 16), (0.25, 4)])
def test_last_step_is_saved_where_early_stopping_ends_the_training(tmp_path, interval, steps):
    """Of a whole epoch Lightning looks at its very end, else at each validation: here every 8 and every 2 steps."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True)
    stopper = EarlyStopping("val/loss", min_delta=1e6, patience=1)
    run = fit(tmp_path, saver, stopper, EndSummary(), max_epochs=9, val_check_interval=interval)
    assert why_ended(run).startswith("early stopping: ") and run.global_step == steps
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        f"epoch={(steps - 1) // 8}-step={steps}.ckpt",
        "last.ckpt",
    }
    assert torch.load(saver.last_model_path, weights_only=False)["global_step"] == steps


def test_training_that_stopped_early_goes_on_with_a_higher_patience(tmp_path):
    """Step and weights as of a training that was not stopped."""

    def stopper(patience):
        return EarlyStopping("val/loss", min_delta=1e6, patience=patience)

    whole = fit(tmp_path, stopper(3), EndSummary(), max_epochs=4, enable_model_summary=False)
    saver = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=100)
    fit(tmp_path, saver, stopper(1), EndSummary(), max_epochs=4)
    resumed = fit(tmp_path, stopper(3), EndSummary(), max_epochs=4, resume=tmp_path / "x.ckpt")
    assert (resumed.global_step, resumed.current_epoch) == (whole.global_step, whole.current_epoch) == (32, 4)
    torch.testing.assert_close(resumed.callback_metrics["val/loss"], whole.callback_metrics["val/loss"])
    done = fit(tmp_path, stopper(9), EndSummary(), max_epochs=3, resume=tmp_path / "x.ckpt")
    assert why_ended(done) == "trainer.max_epochs: 3 is reached"


def test_other_reasons_to_stop_early_name_what_has_to_change(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="x", enable_version_counter=False)
    stopper = EarlyStopping("val/loss", stopping_threshold=99.0)
    run = fit(tmp_path, saver, stopper, EndSummary(), max_epochs=9)
    asked = (
        "To go on: change or remove EarlyStopping's stopping_threshold (99.0) in the configuration, then lit-alignment"
    )
    assert why_ended(run).startswith("early stopping: ") and run.current_epoch == 1
    assert f"{asked} fit --config ... --ckpt_path {tmp_path}/x.ckpt" in ending(run, "")
    stopper.stopping_reason = EarlyStoppingReason.NON_FINITE_METRIC
    assert ending(run, "").endswith("earlier checkpoint, with a lower learning rate or other data")


def test_commands_that_come_next_are_those_that_the_model_can_take(tmp_path, caplog):
    def said(module, data):
        caplog.clear()
        saver = ModelCheckpoint(tmp_path / "kept", filename="x", enable_version_counter=False)
        runner = trainer(tmp_path, callbacks=[saver, EndSummary()], enable_checkpointing=True, max_steps=1)
        with caplog.at_level("INFO", "lightning.pytorch"):
            runner.fit(module, data)
        return caplog.text[caplog.text.index("Next:") :]

    checkpoint = tmp_path / "kept/x.ckpt"
    module = sft_module(lora=True)
    asked = said(module, sft_data(module, chats(2), chats(2)))
    assert f"lit-alignment predict --config ... --ckpt_path {checkpoint}\n" in asked
    assert f"lit-alignment chat {checkpoint}\n" in asked and f"lit-alignment merge {checkpoint} --out" in asked
    module = reward_model()
    asked = said(module, reward_data(module, pairs(2)))
    assert f"--ckpt_path {checkpoint} --data.predict '[{{path: FILE.jsonl}}]'\n" in asked
    assert "chat" not in asked and f"lit-alignment export {checkpoint} --out" in asked
