"""`--ckpt_path newest`: continue where a run stopped, past checkpoints that are damaged."""

import os
import pathlib
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.checkpoint.state_dict_saver import save

from lit_alignment import AtomicCheckpointIO, SFTModule
from lit_alignment.checkpoints.newest import newest_checkpoint
from lit_alignment.checkpoints.resuming import write_into_run_of
from lit_alignment.checkpoints.sharded import partial_path, put_in_place, read_whole
from lit_alignment.errors import CheckpointError
from lit_alignment.trainer_cli import build
from tests.helpers import trainer, weights


def runner(folder):
    saver = ModelCheckpoint(folder, save_top_k=-1)
    return trainer(folder, callbacks=[saver], enable_checkpointing=True)


def write(path, age):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.arange(5000.0)}}, path)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))


def write_sharded(path, value=1.0):
    partial = partial_path(path)
    groups = [{"params": ["x"], "lr": 0.1}]
    optimizer = {"state": {"x": {"exp_avg": torch.ones(5000)}}, "param_groups": groups}
    save(
        {"state_dict": {"x": torch.full((5000,), value)}, "optimizer_0": optimizer}, checkpoint_id=partial, no_dist=True
    )
    put_in_place(partial, path, {"global_step": 3})


@pytest.mark.parametrize("run", [True, False])
def test_resumed_run_writes_into_folders_of_runs_alone(tmp_path, run):
    logger = CSVLogger(tmp_path, name="mine")
    path = tmp_path / "mine/first/checkpoints/x.ckpt"
    path.parent.mkdir(parents=True)
    if run:
        (tmp_path / "mine/first/metrics.csv").write_text("step\n")
        (tmp_path / "mine/first/config.yaml").write_text("seed_everything: 0\n")
    write_into_run_of(str(path), trainer(tmp_path, logger=logger))
    # Other ranks read it, too, where it is the configuration of the resumed run.
    assert (tmp_path / "mine/first/config.yaml").exists() == (tmp_path / "mine/first/config.1.yaml").exists() == run
    assert logger.version == ("first" if run else 0)  # a folder of checkpoints alone may be anybody's
    assert (tmp_path / "mine/first/metrics.1.csv").exists() == run


def test_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, capsys):
    assert newest_checkpoint(runner(tmp_path)) is None
    for age in (1, 2, 3):
        write(tmp_path / f"{age}.ckpt", age)
    assert newest_checkpoint(runner(tmp_path)) == tmp_path / "1.ckpt"
    content = (tmp_path / "1.ckpt").read_bytes()
    (tmp_path / "1.ckpt").write_bytes(content[: len(content) // 2])
    os.utime(tmp_path / "1.ckpt", (1_000_000, 1_000_000))
    assert newest_checkpoint(runner(tmp_path)) == tmp_path / "2.ckpt"
    assert "warning: passed over:" in (said := capsys.readouterr().out) and "1.ckpt: cannot read the checkpoint" in said
    flipped = bytearray((tmp_path / "2.ckpt").read_bytes())
    flipped[len(flipped) // 2] ^= 255  # a bit that went wrong on the disk
    (tmp_path / "2.ckpt").write_bytes(flipped)
    os.utime(tmp_path / "2.ckpt", (999_999, 999_999))
    assert newest_checkpoint(runner(tmp_path)) == tmp_path / "3.ckpt"


@pytest.mark.parametrize("place", range(0, 100, 9))
def test_damage_anywhere_in_the_archive_s_directory_is_passed_over(tmp_path, place, capsys):
    for age in (1, 2):
        write(tmp_path / f"{age}.ckpt", age)
    content = bytearray((tmp_path / "1.ckpt").read_bytes())
    begin = content.rindex(b"PK\x01\x02") - 200 + 3 * place
    content[begin : begin + 24] = bytes(each ^ 255 for each in content[begin : begin + 24])
    (tmp_path / "1.ckpt").write_bytes(content)
    os.utime(tmp_path / "1.ckpt", (1_000_000, 1_000_000))
    assert newest_checkpoint(runner(tmp_path)) == tmp_path / "2.ckpt"
    assert "1.ckpt: cannot read the checkpoint" in capsys.readouterr().out


def test_checkpoint_in_shards_that_lacks_one_is_passed_over(tmp_path, capsys):
    write(tmp_path / "old.ckpt", 1)
    write_sharded(tmp_path / "new.ckpt")
    assert newest_checkpoint(runner(tmp_path)) == tmp_path / "new.ckpt"
    found = read_whole(tmp_path / "new.ckpt")
    assert found["global_step"] == 3 and found["state_dict"]["x"].tolist() == [1.0] * 5000
    (state,) = found["optimizer_states"]
    assert state["param_groups"][0]["params"] == [0] and state["state"][0]["exp_avg"].sum() == 5000
    shard = next((tmp_path / "new.ckpt").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert newest_checkpoint(runner(tmp_path)) == tmp_path / "old.ckpt"
    assert "are needed" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_checkpoint_in_shards_is_read_whichever_python_wrote_it(tmp_path, module, monkeypatch):
    with monkeypatch.context() as other:  # Python 3.13 keeps the classes of pathlib in a module below it
        other.setattr(pathlib.PosixPath, "__module__", module)
        other.setitem(sys.modules, module, pathlib)
        write_sharded(tmp_path / "last.ckpt")
    assert module.encode() in (tmp_path / "last.ckpt/.metadata").read_bytes()
    assert read_whole(tmp_path / "last.ckpt")["global_step"] == 3


def test_checkpoint_in_shards_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    for value in (1.0, 2.0):
        write_sharded(path, value)
        assert AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["x"].tolist() == [value] * 5000
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    # Killed between its two renames, the earlier one stands under another name, and is found.
    os.replace(path, tmp_path / ".last.ckpt.old")
    assert AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["x"].tolist() == [2.0] * 5000


def test_file_takes_the_place_of_a_folder_and_the_other_way_round(tmp_path, monkeypatch):
    """Until the new one has its name the earlier one is there, and is found."""
    path, plugin = tmp_path / "last.ckpt", AtomicCheckpointIO()
    renamed = os.replace

    def killed(source, target):
        if target == path:
            raise OSError("killed")
        renamed(source, target)

    write_sharded(path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(CheckpointError, match="killed"):
            plugin.save_checkpoint({"state_dict": {"x": torch.full((3,), 2.0)}}, path)
    assert plugin.load_checkpoint(path)["state_dict"]["x"].tolist() == [1.0] * 5000
    plugin.save_checkpoint({"state_dict": {"x": torch.full((3,), 2.0)}}, path)
    assert path.is_file() and plugin.load_checkpoint(path)["state_dict"]["x"].tolist() == [2.0] * 3
    write_sharded(path, 3.0)
    assert plugin.load_checkpoint(path)["state_dict"]["x"].tolist() == [3.0] * 5000
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_command_starts_and_then_goes_on(tmp_path, capsys, monkeypatch):
    """The second run begins with the weights that the first one ended with, and trains on one more epoch alone."""
    places = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    ids, starts, steps, ends = [], [], [], []
    training_step = SFTModule.training_step

    def watched(self, batch, batch_idx):
        if not ids[-1]:
            starts.append(weights(self))
        ids[-1].extend(batch.ids)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", watched)
    for epochs, said in ((1, "no checkpoint yet: starting"), (2, "resuming from")):
        ids.append([])
        options = [*places, f"--trainer.max_epochs={epochs}", "--trainer.callbacks=null", "--ckpt_path=newest"]
        run = build(["fit", "--config", "configs/sft/tiny.yaml", *options], run=True)
        assert said in capsys.readouterr().out
        assert run.trainer.current_epoch == epochs
        steps.append(run.trainer.global_step)
        ends.append(weights(run.model))
    assert len(set(ids[0])) == len(ids[0]) and sorted(ids[0]) == sorted(ids[1])
    assert steps[1] == 2 * steps[0] > 0
    for name, value in ends[0].items():
        assert torch.equal(starts[1][name], value), name


def test_folder_between_the_two_renames_of_a_save_is_found(tmp_path, monkeypatch):
    write_sharded(tmp_path / "a.ckpt")
    replace, calls = os.replace, []

    def die_at_the_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("lit_alignment.checkpoints.sharded.os.replace", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_sharded(tmp_path / "a.ckpt", 2.0)
    monkeypatch.undo()
    assert not (tmp_path / "a.ckpt").exists()
    found = newest_checkpoint(runner(tmp_path))
    assert found is not None and read_whole(found)["state_dict"]["x"].tolist() == [1.0] * 5000
    write_sharded(tmp_path / "a.ckpt", 3.0)
    assert newest_checkpoint(runner(tmp_path)) == tmp_path / "a.ckpt"
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
