"""A training goes on from any checkpoint as if nothing had happened, whoever saved it and whenever."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from peft import LoraConfig

from lit_alignment.checkpoints.resuming import predictions_folder
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.modules.sft import SFTModule
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import Killed, chats, sft_data, sft_module, trainer, weights

HOOKS = ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step"]
HOOKS += ["on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_epoch_end", "on_train_end"]


class Journal(Callback):
    """What happened, in order; saves at every hook."""

    def __init__(self, folder=None):
        self.batches, self.validations, self.folder, self.saved = [], [], folder, []
        for hook in HOOKS:
            setattr(self, hook, partial(self.at, hook))

    def at(self, hook, trainer, module, *rest):
        if trainer.sanity_checking:
            return
        if hook == "on_train_batch_start":
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.batches.append([trainer.current_epoch, trainer.global_step, rest[0].ids, rate])
        if hook == "on_train_batch_end":
            self.batches[-1].append(float(rest[0]["loss"]))
        if hook == "on_validation_end":
            where = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            value = float(trainer.callback_metrics["val/loss"])
            self.validations.append((trainer.current_epoch, where, trainer.global_step, value))
        if self.folder is not None:
            path = self.folder / f"{len(self.saved)}-{hook}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append((path, trainer.global_step, len(self.validations)))


class Log(Logger):
    """Keeps what is logged, by step."""

    name, version = "log", "0"

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines += [(step, name, value) for name, value in metrics.items() if name != "epoch"]

    def log_hyperparams(self, *args, **kwargs):
        pass


def fit(folder, resume=None, save=False, callbacks=(), records=14, model=None, **options):
    """One run; what differs from the usual settings of data or of the Trainer is given."""
    given = {name: options.pop(name) for name in ("batch_size", "packing", "seed", "num_workers") if name in options}
    data = {"packing": False, "batch_size": 2, **given}
    journal, log = Journal(folder if save else None), Log()
    module = sft_module(lora=True, **(model or {}))
    usual = {"max_epochs": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 1, "logger": log}
    usual["num_sanity_val_steps"] = 0
    usual["enable_checkpointing"] = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    if scheduling := usual.pop("scheduling", options.pop("scheduling", None)):
        callbacks = [*callbacks, GradientAccumulationScheduler(scheduling)]
    runner = trainer(folder, callbacks=[journal, *callbacks], **(usual | options))
    runner.fit(module, sft_data(module, chats(records), chats(4, seed=1), **data), ckpt_path=resume)
    return journal, log, module, runner


OPTIONS = {
    "validation at the end": {},
    "validation inside of windows": {"val_check_interval": 3},
    "validation over epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "long windows": {"accumulate_grad_batches": 5},
    "no windows": {"accumulate_grad_batches": 1, "val_check_interval": 4},
    "steps": {"max_epochs": -1, "max_steps": 6, "val_check_interval": 3},
    "steps inside of epochs": {"max_steps": 6},
    "limited": {"limit_train_batches": 5},
    "no validation": {"limit_val_batches": 0},
    "every second epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2, "limit_train_batches": 3},
    "other windows each epoch": {"max_epochs": 3, "accumulate_grad_batches": 1, "scheduling": {0: 1, 1: 3, 2: 2}},
}
MORE = ("no windows", "steps", "no validation", "validation over epochs", "every second epoch")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in MORE else name for name in OPTIONS]
)
def test_resume_from_every_moment_is_exact(tmp_path, name):
    whole, log, module, _ = fit(tmp_path, save=True, **OPTIONS[name])
    saved = {}  # of those that agree in all that decides how training goes on, one
    for path, step, validated in whole.saved:
        content = torch.load(path, weights_only=True)
        decisive = [content[key] for key in ("loops", "lit_alignment", "SFTDataModule", "global_step", "epoch")]
        saved[repr(decisive)] = path, step, validated
    expected = weights(module)
    assert len(whole.saved) > 25 and len(saved) > 4
    for path, step, validated in saved.values():
        again, log_again, resumed, _ = fit(tmp_path, resume=path, **OPTIONS[name])
        rest = [batch for batch in whole.batches if batch[1] >= step]
        assert again.batches == rest, path.name
        assert again.validations == whole.validations[validated:], path.name
        found = weights(resumed)
        assert all(torch.equal(found[key], value) for key, value in expected.items()), path.name
        told = [line for line in log.lines if line[1] == "train/loss" and line[0] >= step]
        assert [line for line in log_again.lines if line[1] == "train/loss"] == told, path.name
        told = [line for line in log.lines if line[1] == "val/loss"][validated:]
        assert [line for line in log_again.lines if line[1] == "val/loss"] == told, path.name


class Die(Callback):
    """Ends a run at the k-th call of a hook."""

    def __init__(self, hook, number):
        self.left = number
        setattr(self, hook, self.count)

    def count(self, *_):
        self.left -= 1
        if self.left == 0:
            raise Killed


def stop_early():
    return EarlyStopping("val/loss", patience=1, min_delta=10.0)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_validation_that_was_due_is_made_and_early_stopping_stops_where_it_would_have(tmp_path, hook):
    """Killed between the save behind a step and the end of the validation that follows it."""
    options = {"val_check_interval": 2, "accumulate_grad_batches": 1}
    whole, _, module, _ = fit(tmp_path, callbacks=[stop_early()], **options)
    assert len(whole.validations) == 2 and len(whole.batches) == 4
    saver = ModelCheckpoint(tmp_path / hook, every_n_train_steps=1, filename="{step}")
    with pytest.raises(Killed):
        fit(tmp_path, callbacks=[Die(hook, 2 if hook == "on_validation_start" else 1), stop_early(), saver], **options)
    (path,) = (tmp_path / hook).glob("*.ckpt")
    again, _, resumed, _ = fit(tmp_path, resume=path, callbacks=[stop_early()], **options)
    missed = 1 if hook == "on_validation_start" else 0
    assert again.validations == whole.validations[missed:]
    assert again.batches == whole.batches[2 * (missed + 1) :]
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(module).items())


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [({"max_steps": 3}, {"max_steps": 6}), ({"max_epochs": 1}, {})])
@pytest.mark.parametrize("interval", [1.0, 3])
def test_run_that_its_limit_ended_goes_on_when_that_is_raised(tmp_path, first, then, interval):
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}")
    before, *_ = fit(tmp_path, callbacks=[saver], val_check_interval=interval, **first)
    whole, *_ = fit(tmp_path, val_check_interval=interval, **then)
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    after, *_ = fit(tmp_path, resume=path, val_check_interval=interval, **then)
    step = torch.load(path, weights_only=True)["global_step"]
    assert after.batches and after.batches == [batch for batch in whole.batches if batch[1] >= step]
    assert before.batches == whole.batches[: len(before.batches)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_batch_in_flight_at_an_exception_is_computed_again(tmp_path, number):
    saver = ModelCheckpoint(tmp_path / "saved", save_on_exception=True, every_n_train_steps=100, filename="{step}")
    with pytest.raises(Killed):
        fit(tmp_path, callbacks=[saver, Die("on_before_backward", number)])
    whole, *_ = fit(tmp_path)
    paths = list((tmp_path / "saved").glob("*.ckpt"))
    if number <= 2:  # there is nothing to save before the first step
        assert not paths
        return
    again, *_ = fit(tmp_path, resume=paths[0])
    assert again.batches == whole.batches[2:]


def test_resumed_run_does_not_save_its_checkpoint_once_more(tmp_path):
    def saver():
        return ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")

    fit(tmp_path, callbacks=[saver()], max_epochs=1)
    path = tmp_path / "saved" / "step=2.ckpt"
    with pytest.raises(Killed):  # after the first micro-batch
        fit(tmp_path, resume=path, callbacks=[Die("on_train_batch_start", 2), saver()])
    assert sorted(each.name for each in path.parent.iterdir()) == [f"step={step}.ckpt" for step in range(1, 5)]


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 3},
        {"packing": True},
        {"accumulate_grad_batches": 3},
        {"batch_size": 5, "accumulate_grad_batches": 1},
    ],
)
def test_under_another_plan_each_record_of_the_epoch_is_trained_once(tmp_path, other, caplog):
    whole, *_ = fit(tmp_path, save=True)
    path, step, _ = next(each for each in whole.saved if each[1] == 2 and "batch_start" in each[0].name)
    before = [name for batch in whole.batches if batch[1] < step and batch[0] == 0 for name in batch[2]]
    again, _, _, runner = fit(tmp_path, resume=path, save=True, **other)
    for epoch, trained in ((0, before), (1, [])):
        trained = trained + [name for batch in again.batches if batch[0] == epoch for name in batch[2]]
        assert sorted(trained) == sorted(f"train/r{number}" for number in range(14)), epoch
    assert "changed since the checkpoint: " in caplog.text
    assert "packing" in other or all(f"{name} 2 -> {new}" in caplog.text for name, new in other.items())
    # And once more, from inside of the epoch that was begun with other batches.
    path = next(each[0] for each in again.saved if each[1] == 3 and "batch_start" in each[0].name)
    last, *_ = fit(tmp_path, resume=path)
    trained = before + [name for batch in again.batches if batch[:2] == [0, 2] for name in batch[2]]
    trained += [name for batch in last.batches if batch[0] == 0 for name in batch[2]]
    assert sorted(trained) == sorted(f"train/r{number}" for number in range(14))
    assert runner.global_step == again.batches[-1][1] + 1


def test_other_data_and_another_seed_are_refused_with_what_differs(tmp_path):
    whole, *_ = fit(tmp_path, save=True, max_epochs=1)
    path = whole.saved[5][0]
    with pytest.raises(CheckpointError, match="other data, or in another order: seed 0, now 1; start|seed 0, now 1"):
        fit(tmp_path, resume=path, seed=1)
    with pytest.raises(CheckpointError, match="examples 14, now 13"):
        fit(tmp_path, resume=path, records=13)


@pytest.mark.parametrize("key", ["loops", "SFTDataModule"])
def test_checkpoint_that_does_not_say_where_it_stood_is_refused(tmp_path, key):
    whole, *_ = fit(tmp_path, save=True, max_epochs=1)
    content = torch.load(whole.saved[5][0], weights_only=True)
    del content[key]
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(CheckpointError, match=r"does not say where the training stood.*start a new run"):
        fit(tmp_path, resume=tmp_path / "less.ckpt")


@pytest.mark.slow
def test_changed_settings_of_the_optimizer_take_effect_and_are_said(tmp_path, caplog):
    usual = {"schedule": "constant", "warmup": 0}
    whole, *_ = fit(tmp_path, save=True, model={"optimizer": OptimizerConfig(learning_rate=1e-2, **usual)})
    path = next(each[0] for each in whole.saved if each[1] == 2)
    other = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, **usual)
    again, _, _, runner = fit(tmp_path, resume=path, model={"optimizer": other})
    assert {batch[3] for batch in again.batches} == {1e-3}
    assert {group["weight_decay"] for group in runner.optimizers[0].param_groups} == {0.1}
    assert "learning_rate: 0.01 -> 0.001; weight_decay: 0.0 -> 0.1" in caplog.text


@pytest.mark.slow
def test_schedule_goes_on_to_the_new_end(tmp_path):
    falling = {"optimizer": OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup=0)}
    whole, *_ = fit(tmp_path, save=True, model=falling)
    path = next(each[0] for each in whole.saved if each[1] == 2)
    again, *_ = fit(tmp_path, resume=path, model=falling, max_epochs=3)
    assert [batch[3] for batch in again.batches][::2][:3] == pytest.approx([1e-2 * (1 - s / 12) for s in (2, 3, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.9, 6])
@pytest.mark.parametrize("other", [{"batch_size": 3}, {"accumulate_grad_batches": 3}])
def test_limit_of_the_batches_is_refused_with_another_plan(tmp_path, limit, other):
    whole, *_ = fit(tmp_path, save=True, limit_train_batches=limit)
    path = next(each[0] for each in whole.saved if each[1] == 2)
    with pytest.raises(ConfigError, match=r"2 -> 3\). Resume with the same batches until the epoch ends, or without"):
        fit(tmp_path, resume=path, limit_train_batches=limit, **other)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [6, 0.9])
def test_epoch_that_was_begun_otherwise_is_as_long_as_ever(tmp_path, interval):
    """An interval between validations that the rest of the epoch alone would not hold."""
    whole, *_ = fit(tmp_path, save=True, val_check_interval=interval)
    path = next(each[0] for each in whole.saved if each[1] == 3 and "batch_start" in each[0].name)
    again, *_ = fit(tmp_path, resume=path, accumulate_grad_batches=1, val_check_interval=interval)
    assert [batch[1] for batch in again.batches] == list(range(3, 11))
    assert [each[:3] for each in again.validations] == [(1, 6, 10)]  # the first epoch had its own


def test_other_adapters_are_refused_by_what_differs(tmp_path):
    whole, *_ = fit(tmp_path, save=True, max_epochs=1)
    path = whole.saved[5][0]
    for settings, words in (({"r": 8}, "have r: 4, this run's 8"), ({"lora_alpha": 2}, "have lora_alpha: 8, this")):
        peft = LoraConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings))
        module = SFTModule(BackboneConfig("configs/tiny", weights="random"), peft)
        with pytest.raises(CheckpointError, match=words):
            trainer(tmp_path).validate(module, sft_data(module, chats(2), chats(2)), ckpt_path=path)
    module = sft_module()
    with pytest.raises(CheckpointError, match=r"this run has none\. Give the config\.yaml of its run"):
        trainer(tmp_path).validate(module, sft_data(module, chats(2), chats(2)), ckpt_path=path)


def test_best_checkpoint_is_ranked_by_the_metric_of_its_own_step(tmp_path):
    """Saves are asked for at each step, validation comes at every second one."""
    saver = ModelCheckpoint(tmp_path / "best", "{step}", "val/loss", every_n_train_steps=1, save_top_k=-1)
    journal, *_ = fit(tmp_path, callbacks=[saver], val_check_interval=2, accumulate_grad_batches=1)
    measured = {step: value for _, _, step, value in journal.validations}
    assert len(measured) == 6
    for path, score in saver.best_k_models.items():
        assert float(score) == measured[torch.load(path, weights_only=True)["global_step"]]
    assert len(saver.best_k_models) == 6


def test_checkpoint_of_another_method_or_backbone_is_refused_with_the_way_to_start_from_it(tmp_path):
    """Names and shapes of the trained weights agree."""
    whole, *_ = fit(tmp_path, save=True, max_epochs=1)
    path = whole.saved[5][0]
    content = torch.load(path, weights_only=True)
    for change, words in (
        ({"module": "lit_alignment.modules.rag.RAGModule"}, "is of RAGModule, not of SFTModule. To go on from its"),
        (
            {"backbone": content["lit_alignment"]["backbone"] | {"path": "other/model"}},
            "trained over other/model, revision main, not",
        ),
    ):
        torch.save(content | {"lit_alignment": content["lit_alignment"] | change}, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=words):
            fit(tmp_path, resume=tmp_path / "other.ckpt")
        module = sft_module(lora=True)
        with pytest.raises(CheckpointError, match=words):
            trainer(tmp_path).predict(module, sft_data(module, chats(2), chats(2)), ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.slow
def test_objects_of_a_resumed_run_begin_anew_in_another(tmp_path):
    """The same module and data module, under a new Trainer and without a checkpoint."""
    whole, *_ = fit(tmp_path, save=True, max_epochs=1)
    path = next(each[0] for each in whole.saved if each[1] == 2 and "batch_start" in each[0].name)
    module = sft_module(lora=True)
    data = sft_data(module, chats(14), chats(4, seed=1), packing=False, batch_size=2)
    trainer(tmp_path, accumulate_grad_batches=2).fit(module, data, ckpt_path=path)
    journal = Journal()
    trainer(tmp_path, callbacks=[journal], accumulate_grad_batches=2).fit(module, data)
    assert [batch[2] for batch in journal.batches] == [batch[2] for batch in whole.batches]
    assert len(journal.validations) == 1


@pytest.mark.slow
def test_subclass_with_an_optimizer_of_its_own_trains_and_resumes(tmp_path):
    class Own(SFTModule):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def run(resume=None):
        torch.manual_seed(0)
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        module = Own(BackboneConfig("configs/tiny", weights="random"), peft)
        saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        runner = trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
        runner.fit(module, sft_data(module, chats(8), packing=False, batch_size=2), ckpt_path=resume)
        return weights(module)

    whole = run()
    again = run(tmp_path / "saved/step=3.ckpt")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_predictions_of_a_checkpoint_go_into_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/sft/version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    first, second = (run / "checkpoints" / f"epoch=0-step={step}.ckpt" for step in (4, 8))
    assert predictions_folder(first) == Path("runs/sft/version_0/predictions/epoch=0-step=4")
    assert predictions_folder("runs/sft/version_0/checkpoints/epoch=0-step=8.ckpt") != predictions_folder(first)
    assert predictions_folder(second) == Path("runs/sft/version_0/predictions/epoch=0-step=8")
    monkeypatch.chdir(run / "checkpoints")
    assert predictions_folder(first) == run / "predictions/epoch=0-step=4"
    assert predictions_folder(None) == predictions_folder(tmp_path / "else/x.ckpt") == Path("predictions")
