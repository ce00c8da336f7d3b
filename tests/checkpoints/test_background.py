"""Checkpoints written while training continues: what they hold, in which order, and what happens when one fails."""

import json
import random
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lit_alignment import AsyncCheckpointIO, AtomicCheckpointIO, Export, FSDP2Strategy, Upload, wait_for_saves
from lit_alignment.checkpoints.background import start_saving
from lit_alignment.distributed import fsdp2
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.trainer_cli import build
from tests.helpers import Seen, chats, sft_data, sft_module, trainer
from tests.helpers.ranks import kill_after_first, run_on_ranks


class Held:
    """Stands in for torch.save, and lets it begin only when it is told to."""

    def __init__(self, monkeypatch):
        self.real, self.begun, self.go = torch.save, threading.Event(), threading.Event()
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, *arguments):
        self.begun.set()
        assert self.go.wait(60)
        self.real(*arguments)


def started():
    plugin = AsyncCheckpointIO()
    plugin.saves.start()
    return plugin


def fail(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)


def test_what_changes_after_a_save_does_not_reach_the_file(tmp_path, monkeypatch):
    held, plugin = Held(monkeypatch), started()
    weight, kept = torch.zeros(1000), {"a.ckpt": torch.tensor(1.0)}
    checkpoint = {"state_dict": {"x": weight, "tied": weight.detach()}, "callbacks": {"saver": {"kept": kept}}}
    plugin.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert held.begun.wait(60)
    weight.fill_(1)
    kept["b.ckpt"] = torch.tensor(2.0)
    held.go.set()
    found = plugin.load_checkpoint(tmp_path / "a.ckpt")
    plugin.teardown()
    assert found["state_dict"]["x"].tolist() == [0.0] * 1000
    assert found["state_dict"]["x"].data_ptr() == found["state_dict"]["tied"].data_ptr()
    assert set(found["callbacks"]["saver"]["kept"]) == {"a.ckpt"}


def test_earlier_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    AtomicCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "old.ckpt")
    held, plugin = Held(monkeypatch), started()
    plugin.save_checkpoint({"x": 2}, tmp_path / "new.ckpt")
    plugin.remove_checkpoint(tmp_path / "old.ckpt")
    plugin.saves.link(tmp_path / "new.ckpt", tmp_path / "last.ckpt")
    assert held.begun.wait(60)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"old.ckpt"}
    # ModelCheckpoint is told what will be there.
    assert plugin.saves.exists(tmp_path / "new.ckpt") and not plugin.saves.exists(tmp_path / "old.ckpt")
    held.go.set()
    plugin.teardown()
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"new.ckpt", "last.ckpt"}
    assert plugin.load_checkpoint(tmp_path / "last.ckpt") == {"x": 2}


def test_second_save_waits_for_the_first(tmp_path, monkeypatch):
    held, plugin = Held(monkeypatch), started()
    plugin.save_checkpoint({"x": 1}, tmp_path / "a.ckpt")
    assert held.begun.wait(60)
    second = threading.Thread(target=plugin.save_checkpoint, args=({"x": 2}, tmp_path / "b.ckpt"))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not plugin.saves.exists(tmp_path / "b.ckpt")
    held.go.set()
    second.join(60)
    plugin.teardown()
    assert [AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt")["x"] for name in "ab"] == [1, 2]


def test_failed_save_is_raised_once_by_whatever_comes_next_and_removes_nothing(tmp_path, monkeypatch):
    AtomicCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "old.ckpt")
    for name in ("save", "wait", "teardown"):
        with monkeypatch.context() as patched:
            fail(patched)
            plugin = started()
            plugin.save_checkpoint({"x": 2}, tmp_path / "new.ckpt")
            plugin.remove_checkpoint(tmp_path / "old.ckpt")
            follow = {
                "save": lambda p=plugin: p.save_checkpoint({"x": 3}, tmp_path / "next.ckpt"),
                "wait": plugin.saves.wait,
                "teardown": plugin.teardown,
            }
            with pytest.raises(CheckpointError, match=r"new.ckpt: cannot save the checkpoint .*No space left"):
                follow[name]()
        plugin.teardown()
        assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]


def test_without_a_fit_and_before_slurm_ends_the_job_a_save_is_done_when_it_returns(tmp_path):
    AsyncCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "a.ckpt")
    plugin = started()
    plugin.save_checkpoint({"x": 1}, tmp_path / "hpc_ckpt_1.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "hpc_ckpt_1.ckpt"}
    plugin.teardown()


def fit(folder, plugin, savers, resume=None, callbacks=(), **options):
    seen = Seen()
    module = sft_module(lora=True)
    options = {"max_epochs": 2, "enable_checkpointing": True, "plugins": [plugin], **options}
    runner = trainer(folder, callbacks=[seen, *callbacks, *savers], **options)
    runner.fit(module, sft_data(module, chats(14), packing=False, batch_size=2), ckpt_path=resume)
    return seen, runner


@pytest.mark.slow
def test_resume_gives_the_losses_of_a_synchronous_run(tmp_path):
    def saver(name):
        return ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    expected, _ = fit(tmp_path, AtomicCheckpointIO(), [saver("sync")])
    found, _ = fit(tmp_path, AsyncCheckpointIO(), [saver("async")])
    assert found.losses == expected.losses
    assert {p.name for p in (tmp_path / "async").iterdir()} == {p.name for p in (tmp_path / "sync").iterdir()}
    for step in (4, 8):
        rest, _ = fit(tmp_path, AsyncCheckpointIO(), [saver("rest")], tmp_path / "async" / f"step={step}.ckpt")
        assert rest.ids == expected.ids[step:]
        assert rest.losses == pytest.approx(expected.losses[step:], rel=1e-6)


@pytest.mark.parametrize("last", [True, "link"])
@pytest.mark.slow
def test_savers_keep_the_files_that_they_keep_without_a_thread(last, tmp_path):
    """Two in one folder with the same names, of which one is given a version; and the last one, or a link to it."""

    def run(name, plugin):
        shared = {"dirpath": tmp_path / name, "filename": "x", "save_top_k": 2, "every_n_train_steps": 1}
        savers = [
            ModelCheckpoint(**shared, monitor="train/loss", save_last=last),
            ModelCheckpoint(**shared, monitor="train/grad_norm"),
        ]
        _, runner = fit(tmp_path, plugin, savers)
        kept = [sorted(str(p).replace(name, "") for p in saver.best_k_models) for saver in savers]
        whole = {p.name: plugin.load_checkpoint(p)["global_step"] for p in (tmp_path / name).glob("*.ckpt")}
        return kept, whole, [p.name for p in (tmp_path / name).iterdir() if p.is_symlink()], runner

    (kept, whole, links, _), (found_kept, found, found_links, _) = (
        run("sync", AtomicCheckpointIO()),
        run("async", AsyncCheckpointIO()),
    )
    assert found_kept == kept and found == whole and len(found) == 5
    assert found_links == links == (["last.ckpt"] if last == "link" else [])


class Reads(Callback):
    """Reads the newest checkpoint in the step after it was saved."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, *_):
        wait_for_saves(trainer)
        if path := trainer.checkpoint_callback.best_model_path:
            self.steps.append(torch.load(path, weights_only=True)["global_step"])


def test_reader_in_the_middle_of_a_fit_waits(tmp_path):
    reads = Reads()
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1)
    _, runner = fit(tmp_path, AsyncCheckpointIO(), [saver], callbacks=[reads])
    assert reads.steps == list(range(1, runner.global_step))


def test_export_and_upload_take_whole_checkpoints(tmp_path):
    saver = ModelCheckpoint(
        tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
    )
    callbacks = [Export(which="kept", form="adapter"), Upload((tmp_path / "remote").as_uri())]
    fit(tmp_path, AsyncCheckpointIO(), [saver], callbacks=callbacks, max_epochs=1)
    for path in saver.best_k_models:
        stored = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
        exported = load_file(path.removesuffix(".ckpt") + "/adapter_model.safetensors")
        assert len(exported) == len(stored) > 0
        sums = [sum(float(value.double().sum()) for value in each.values()) for each in (exported, stored)]
        assert sums[0] == pytest.approx(sums[1])
    listed = json.loads((tmp_path / "remote" / "manifest.json").read_text())["items"]
    assert len([item for item in listed if item["kind"] == "checkpoint"]) == 7
    for item in listed:
        if item["kind"] == "checkpoint":
            step = AtomicCheckpointIO().load_checkpoint(tmp_path / "remote" / item["name"])["global_step"]
            assert item["name"] == f"step={step}.ckpt" and item["step"] == step and not item["problem"]


def test_failed_save_ends_the_fit(tmp_path, monkeypatch):
    fail(monkeypatch)
    for every in (1, 7):  # the next save raises it, or the end of the run
        saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=every)
        with pytest.raises(CheckpointError, match=f"step={every}.ckpt: cannot save the checkpoint"):
            fit(tmp_path, AsyncCheckpointIO(), [saver], max_epochs=1)
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_plugin_beside_fsdp2_is_refused(tmp_path):
    runner = trainer(tmp_path, strategy=FSDP2Strategy(process_group_backend="gloo"), plugins=[AsyncCheckpointIO()])
    with pytest.raises(ConfigError, match="set trainer.strategy.init_args.async_save: true"):
        start_saving(runner)


@pytest.mark.slow
def test_command_takes_the_plugin_from_yaml(tmp_path):
    (tmp_path / "async.yaml").write_text("trainer: {plugins: [{class_path: lit_alignment.AsyncCheckpointIO}]}")
    places = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    files = ["--config", "configs/sft/tiny.yaml", "--config", str(tmp_path / "async.yaml")]
    run = build(["fit", *files, *places, "--trainer.max_epochs=1"], run=True)
    assert type(run.trainer.strategy.checkpoint_io) is AsyncCheckpointIO
    best = run.trainer.checkpoint_callback.best_model_path
    assert torch.load(best, weights_only=True)["global_step"] > 0
    assert (Path(best).parent / "export" / "config.json").is_file() or list(Path(best).parent.glob("export/*"))


def fit_without_space(folder, sharded):
    """On each of two ranks, of which the first cannot finish a checkpoint; each writes what it was told."""

    def no_space(*_):
        raise OSError("no space")

    if sharded:
        fsdp2.put_in_place = no_space
    else:
        torch.save = no_space
    strategy = FSDP2Strategy(sharded, process_group_backend="gloo", async_save=True)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1)
    options = {"max_steps": 3, "enable_checkpointing": True, "callbacks": [saver]}
    runner = trainer(folder, strategy=strategy, devices=2, **options)
    module = sft_module()
    try:
        runner.fit(module, sft_data(module, chats(20), packing=False, batch_size=2))
    except CheckpointError as error:
        (folder / f"{runner.global_rank}.txt").write_text(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False])
def test_rank_that_cannot_save_stops_all_ranks(sharded, tmp_path):
    run_on_ranks(fit_without_space, tmp_path, sharded)
    for rank in (0, 1):
        assert "step=1.ckpt: cannot save the checkpoint (no space)" in (tmp_path / f"{rank}.txt").read_text()
    assert [path.name for path in tmp_path.glob("*.ckpt")] == []


def save_in_the_background(folder, number):
    plugin, weight = AsyncCheckpointIO(), torch.zeros(400_000)
    plugin.saves.start()
    before = list(folder.glob("*.ckpt"))
    while True:
        number += 1
        weight.fill_(number)
        path = folder / f"{number}.ckpt"
        plugin.save_checkpoint({"number": number, "x": weight}, path)
        for old in before:
            plugin.remove_checkpoint(old)
        before = [path]


def kill_savers_in_the_background(folder):
    """Fifty runs that save, remove and change the weights without pause, each killed after its first save."""
    generator, interrupted, earlier = random.Random(0), 0, 0
    for _ in range(50):
        run = partial(save_in_the_background, folder, earlier)
        kill_after_first(run, folder / f"{earlier + 1}.ckpt", generator.uniform(0, 0.05))
        interrupted += any(file.name.endswith(".partial") for file in folder.iterdir())
        for file in folder.glob(".*.partial"):
            file.unlink()
        found = [AtomicCheckpointIO().load_checkpoint(path) for path in folder.glob("*.ckpt")]
        assert all(state["x"].tolist() == [float(state["number"])] * 400_000 for state in found)
        newest = max(state["number"] for state in found)
        assert newest > earlier
        earlier = newest
    assert interrupted > 5


@pytest.mark.slow
def test_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    run_on_ranks(kill_savers_in_the_background, tmp_path, ranks=1)
