"""Slim, atomic checkpoints, and resuming inside an epoch."""

import random
import resource
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import AtomicCheckpointIO
from lit_alignment.errors import CheckpointError
from lit_alignment.models.loading import BackboneConfig
from tests.helpers import Killed, Seen, chats, sft_data, sft_module, trainer, weights
from tests.helpers.ranks import kill_after_first, run_on_ranks


def run(folder, die_at=None, resume=None, **data):
    seen = Seen(die_at)
    saver = ModelCheckpoint(folder / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = sft_module(lora=True)
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    runner = trainer(folder, callbacks=[seen, saver], **options)
    try:
        runner.fit(module, sft_data(module, chats(14), chats(4, seed=1), **data), ckpt_path=resume)
    except Killed:
        pass
    return seen, runner, module


def newest(folder):
    return max((folder / "ckpt").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))


@pytest.mark.parametrize(
    "data", [{"packing": False, "batch_size": 2}, {"tokens_per_batch": 512}], ids=["padded", "packed"]
)
@pytest.mark.slow
def test_resume_sees_the_same_records_and_losses(tmp_path, data):
    """Killed in mid-epoch, then in the second epoch, then twice in one epoch."""
    whole, _, module = run(tmp_path / "whole", **data)
    per_epoch = len(whole.ids) // 3
    assert per_epoch >= 4 and whole.ids[:per_epoch] != whole.ids[per_epoch : 2 * per_epoch]
    for name, kills in {"mid": [3], "second": [per_epoch + 3], "twice": [2, 4], "boundary": [per_epoch]}.items():
        seen, resume, offset = [], None, 0
        for kill in [*kills, None]:
            part, runner, resumed = run(tmp_path / name, None if kill is None else kill - offset, resume, **data)
            # What came after the last checkpoint, which stands at the last finished optimizer step, is seen again.
            seen = seen[:offset] + list(zip(part.ids, part.losses, strict=True))
            if kill is not None:
                resume = newest(tmp_path / name)
                steps = torch.load(resume, weights_only=True)["global_step"]
                offset = batches_after(steps, per_epoch)
        assert [ids for ids, _ in seen] == whole.ids, name
        assert [loss for _, loss in seen] == pytest.approx(whole.losses, rel=1e-5), name
        for key, value in weights(module).items():
            torch.testing.assert_close(weights(resumed)[key], value, rtol=1e-4, atol=1e-6)


def batches_after(steps, per_epoch):
    """Batches that so many optimizer steps used, with windows of two and a short one at the end of an epoch."""
    windows = -(-per_epoch // 2)
    epochs, rest = divmod(steps, windows)
    return epochs * per_epoch + min(rest * 2, per_epoch)


@pytest.mark.slow
def test_resume_with_workers_sees_the_same_records(tmp_path):
    data = {"packing": False, "batch_size": 2, "num_workers": 2}
    whole, _, _ = run(tmp_path / "whole", **data)
    first, _, _ = run(tmp_path / "killed", 3, **data)
    rest, _, _ = run(tmp_path / "killed", None, newest(tmp_path / "killed"), **data)
    assert first.ids[:2] + rest.ids == whole.ids


def test_lora_checkpoint_holds_no_frozen_weight(tmp_path):
    _, _, module = run(tmp_path)
    checkpoint = torch.load(newest(tmp_path), weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"{n}" for n, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in checkpoint["state_dict"])
    trained = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() * 4 for p in module.parameters() if not p.requires_grad)
    assert newest(tmp_path).stat().st_size < 3 * trained + 100_000 < frozen + 3 * trained
    assert checkpoint["lit_alignment"]["peft"]["r"] == 4


def test_full_checkpoint_holds_everything_that_was_trained(tmp_path):
    module = sft_module()
    saver = ModelCheckpoint(tmp_path, filename="full")
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(module, sft_data(module, chats(4)))
    assert set(torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]) == {
        n for n, _ in module.named_parameters()
    }


def test_missing_trained_weight_is_an_error(tmp_path):
    run(tmp_path)
    path = newest(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    gone = sorted(checkpoint["state_dict"])[0]
    del checkpoint["state_dict"][gone]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=f"lacks 1 trained weights, the first is '{gone}'"):
        run(tmp_path, resume=path)


def test_checkpoint_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "x": Path("boom")}, path)
    refusal = r"evil.ckpt: names pathlib\.(_local\.)?PosixPath, and a checkpoint holds weights and plain"
    with pytest.raises(CheckpointError, match=refusal):
        AtomicCheckpointIO().load_checkpoint(path)


def test_truncated_checkpoint_is_named(tmp_path):
    run(tmp_path)
    path = newest(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="It is damaged; use an earlier one"):
        AtomicCheckpointIO().load_checkpoint(path)


def save_twice_of_which_once_fits(path):
    """A file-size limit stands in for a full disk: the kernel refuses the write in the same way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(10)}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with pytest.raises(CheckpointError, match="Earlier checkpoints are untouched"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(1_000_000)}, path)


@pytest.mark.slow
def test_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    run_on_ranks(save_twice_of_which_once_fits, tmp_path / "a.ckpt", ranks=1)
    assert len(AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["x"]) == 10
    assert [path.name for path in tmp_path.glob("*") if path.is_file()] == ["a.ckpt"]


def interrupt_saves(path):
    """Two hundred Ctrl-C at random moments of saves; each is repeated, as a destructor may swallow it."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    generator, state = random.Random(0), {"state": {str(number): torch.zeros(1000) for number in range(300)}}
    AtomicCheckpointIO().save_checkpoint(state, path)
    for _ in range(200):
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(0.0005, 0.012), 0.5)
            while True:
                AtomicCheckpointIO().save_checkpoint(state, path)
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.slow
def test_ctrl_c_during_a_save_ends_it_and_nothing_else(tmp_path):
    run_on_ranks(interrupt_saves, tmp_path / "a.ckpt", ranks=1)
    assert [path.name for path in tmp_path.glob("*") if path.is_file()] == ["a.ckpt"]


def save_without_pause(path):
    number = 0
    while True:
        number += 1
        AtomicCheckpointIO().save_checkpoint({"number": number, "x": torch.full((400_000,), float(number))}, path)


def kill_savers(path):
    """Fifty processes that save without pause, each killed at a random moment after its first save."""
    generator, interrupted = random.Random(0), 0
    for _ in range(50):
        for file in path.parent.iterdir():
            file.unlink()
        kill_after_first(partial(save_without_pause, path), path, generator.uniform(0, 0.05))
        interrupted += len(list(path.parent.iterdir())) > 1
        state = AtomicCheckpointIO().load_checkpoint(path)
        assert state["x"].tolist() == [float(state["number"])] * 400_000
    assert interrupted > 5  # the kills did fall into saves


@pytest.mark.slow
def test_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    run_on_ranks(kill_savers, tmp_path / "run" / "last.ckpt", ranks=1)


def test_backbone_is_written_down_in_plain_values(tmp_path):
    run(tmp_path)
    stored = torch.load(newest(tmp_path), weights_only=True)["lit_alignment"]
    assert BackboneConfig(**stored["backbone"]) == BackboneConfig("configs/tiny", weights="random")
