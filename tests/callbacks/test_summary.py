"""The end of a training says why, what was best, and how to go on."""

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_alignment.callbacks.summary import ending, why_ended
from tests.helpers import chats, sft_data, sft_module, trainer


def fit(folder, *callbacks, **settings):
    module = sft_module()
    data = sft_data(module, chats(8), chats(4, seed=1), packing=False, batch_size=1)
    run = trainer(folder, callbacks=[*callbacks], enable_checkpointing=bool(callbacks), **settings)
    run.fit(module, data)
    return run


def test_early_stopping_is_named_with_the_best_step_and_the_command(tmp_path):
    saver = ModelCheckpoint(tmp_path / "some where", monitor="val/loss")
    stopper = EarlyStopping("val/loss", min_delta=1e6, patience=1)
    logger = CSVLogger(tmp_path / "a run", name="n")
    run = fit(tmp_path, saver, stopper, max_epochs=9, logger=logger)
    config = tmp_path / "a run/n/version_0/config.yaml"
    config.write_text("")
    line = ending(run, why_ended(run))
    assert line.startswith("early stopping: ") and "did not improve in the last 1 records" in line
    assert f"(optimizer step 16, epoch {run.current_epoch})" in line
    step = saver.best_model_path.rpartition("step=")[2].removesuffix(".ckpt")
    assert f"Best val/loss: {float(saver.best_model_score):.4g} at step {step}, {saver.best_model_path}." in line
    assert line.endswith(f"To go on: lit-alignment fit --config '{config}' --ckpt_path '{saver.best_model_path}'")


def test_a_limit_that_is_reached_is_raised_in_the_command(tmp_path):
    run = fit(tmp_path, ModelCheckpoint(tmp_path), max_steps=4, max_epochs=-1)
    assert ending(run, why_ended(run)) == (
        "trainer.max_steps: 4 is reached (optimizer step 4, epoch 1). "
        f"To go on: lit-alignment fit --config ... --ckpt_path {tmp_path}/epoch=0-step=4.ckpt --trainer.max_steps 8"
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
    assert ending(run, "interrupted") == "interrupted (optimizer step 8, epoch 1)."
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=100)
    assert ending(fit(tmp_path, saver), "interrupted").endswith("epoch 1). No checkpoint was saved.")
