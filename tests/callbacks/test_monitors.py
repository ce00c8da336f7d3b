"""A metric that nothing logs is refused before the first epoch, with the nearest name."""

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lit_alignment.callbacks.monitors import Monitors
from lit_alignment.errors import ConfigError
from tests.helpers import chats, class_data, classifier, labelled, sft_data, sft_module, trainer


class Steps(Callback):
    """Counts optimizer steps."""

    def __init__(self) -> None:
        self.number = 0

    def on_train_batch_end(self, trainer, *_) -> None:
        self.number = trainer.global_step


class Foreign(Callback):
    """Logs what nobody else knows of."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.log("own", 1.0)


def fit(folder, watcher, *more, val=True, **settings):
    module, steps = sft_module(), Steps()
    steps.__class__.__module__ = "lit_alignment.tests"
    data = sft_data(module, chats(8), chats(4, seed=1) if val else None, packing=False, batch_size=1)
    settings |= {"enable_checkpointing": isinstance(watcher, ModelCheckpoint), "log_every_n_steps": 1}
    run = trainer(folder, callbacks=[Monitors(), watcher, steps, *more], **settings)
    try:
        run.fit(module, data)
    except ConfigError as error:
        return str(error), steps.number
    return "", steps.number


@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
def test_wrong_monitor_of_validation_is_refused_before_the_first_step(tmp_path, kind):
    message, steps = fit(tmp_path, kind(monitor="val/los"))
    assert message == f"{kind.__name__}: monitor is 'val/los', which is not logged. Did you mean 'val/loss'?"
    assert steps == 0
    message, steps = fit(tmp_path, kind(monitor="accuracy"))
    assert "Did you mean 'val/token_accuracy'?" in message and steps == 0


def test_without_a_sanity_check_the_first_validation_tells(tmp_path):
    message, steps = fit(tmp_path, EarlyStopping("val/los"), num_sanity_val_steps=0, val_check_interval=2)
    assert "Did you mean 'val/loss'?" in message and steps == 2


def test_monitor_of_training_is_refused_after_the_first_step(tmp_path):
    message, steps = fit(tmp_path, EarlyStopping("train/los", check_on_train_epoch_end=True))
    assert "monitor is 'train/los', which is not logged. Did you mean 'train/loss'?" in message and steps == 0


def test_validation_metric_without_validation_data_is_refused_at_once(tmp_path):
    message, steps = fit(tmp_path, ModelCheckpoint(monitor="val/loss"), val=False)
    assert "monitor is 'val/loss', and nothing is validated. Give data.val" in message and steps == 0


@pytest.mark.parametrize("name", ["val/loss", "val/perplexity", "train/loss", "train/grad_norm"])
def test_right_monitors_are_left_alone(tmp_path, name):
    saver = ModelCheckpoint(tmp_path, monitor=name, save_on_train_epoch_end=True)
    assert fit(tmp_path, saver) == ("", 8) and saver.best_model_score is not None


def test_metric_that_a_callback_of_others_logs_later_is_left_alone(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="own", save_on_train_epoch_end=True)
    assert fit(tmp_path, saver, Foreign()) == ("", 8)


@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
def test_metric_that_the_validation_does_not_define_is_refused(tmp_path, kind):
    """The sanity check sees a few records, which may well have one class while all have several."""
    for number, refused in ((2, "needs records of two classes or more and data.val has none. Validate on"), (6, "")):
        model, watcher = classifier(), kind(monitor="val/auroc", mode="max")
        val = sorted(labelled(6, seed=1), key=lambda record: record["label"])[:number]
        data = class_data(model, labelled(6), val, packing=False, batch_size=1)
        saves = {"enable_checkpointing": kind is ModelCheckpoint, "num_sanity_val_steps": 1}
        run = trainer(tmp_path, callbacks=[Monitors(), watcher], **saves)
        if refused:
            with pytest.raises(ConfigError, match=f"{kind.__name__}: monitor is 'val/auroc', which {refused}"):
                run.fit(model, data)
        else:
            run.fit(model, data)
            best = watcher.best_model_score if kind is ModelCheckpoint else watcher.best_score
            assert 0 <= float(best) <= 1
