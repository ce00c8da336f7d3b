"""Signals and errors end a training where it stands, and nothing of it is lost."""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lit_alignment import AsyncCheckpointIO, AtomicCheckpointIO
from lit_alignment.callbacks.interrupt import Interrupt
from lit_alignment.checkpoints.resuming import CheckpointConnector
from lit_alignment.cli import main
from lit_alignment.data.examples import ExampleMaker
from lit_alignment.errors import Stopped
from tests.helpers import ROOT, Seen, chats, sft_data, sft_module, trainer, weights, write_jsonl
from tests.helpers.commands import ForkedCommand
from tests.helpers.ranks import run_on_ranks

EXAMPLES = 16


class Destroyed:
    """Something whose destructor runs when the signal arrives."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


class During(Callback):
    """Does something in a hook of the given micro-batch, on the given rank."""

    def __init__(self, what, hook="on_train_batch_end", number=3, rank=0):
        self.what, self.number, self.rank = what, number, rank
        setattr(self, hook, self.act)

    def act(self, trainer, *rest):
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.number and trainer.global_rank == self.rank:
            self.what()


class Unexpected(Exception):
    pass


def fails():
    raise Unexpected


@pytest.fixture(autouse=True)
def signals():
    """The handlers of the tests' own process, put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fit(folder, *callbacks, resume=None, saver=True, **options):
    seen = Seen()
    savers = [ModelCheckpoint(folder / "ckpt")] if saver else []
    module = sft_module(lora=True)
    usual = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": saver}
    run = trainer(folder, callbacks=[*callbacks, seen, *savers, Interrupt()], **(usual | options))
    run._checkpoint_connector = CheckpointConnector(run)
    data = sft_data(module, chats(EXAMPLES), chats(4, seed=1), packing=False, batch_size=2)
    try:
        run.fit(module, data, ckpt_path=resume)
    except (Stopped, Unexpected) as error:
        return seen, module, error
    return seen, module, None


@pytest.mark.parametrize(
    ("what", "hook", "code"),
    [
        (partial(signal.raise_signal, signal.SIGTERM), "on_train_batch_end", 143),
        (partial(signal.raise_signal, signal.SIGINT), "on_train_batch_end", 130),
        (partial(signal.raise_signal, signal.SIGTERM), "on_before_optimizer_step", 143),
        (partial(signal.raise_signal, signal.SIGTERM), "on_before_backward", 143),
        (partial(signal.raise_signal, signal.SIGTERM), "on_validation_batch_end", 143),
        (Destroyed, "on_train_batch_end", 130),
        (fails, "on_train_batch_end", None),
        (fails, "on_validation_batch_end", None),
        (fails, "on_before_backward", None),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_training_is_saved_where_it_ends_and_goes_on_as_if_nothing_had_been(tmp_path, what, hook, code):
    whole, expected, _ = fit(tmp_path / "whole")
    # In the middle of a window, in a step, or behind the epoch.
    number = {"on_validation_batch_end": EXAMPLES // 2, "on_before_optimizer_step": 4}.get(hook, 3)
    first, _, error = fit(tmp_path / "x", During(what, hook, number))
    left = tmp_path / "x/ckpt/interrupted.ckpt"
    assert left.is_file() and len(first.losses) < len(whole.losses)
    if code is not None:
        assert error.code == code and str(left) in str(error)
    rest, module, _ = fit(tmp_path / "x", resume=left)
    stood = len(whole.losses) - len(rest.losses)  # the open window is computed again
    assert stood >= 2 and first.losses[:stood] + rest.losses == whole.losses
    assert all(torch.equal(value, weights(module)[name]) for name, value in weights(expected).items())


def test_what_was_saved_at_this_step_already_is_not_saved_again(tmp_path):
    every = ModelCheckpoint(tmp_path / "every", every_n_train_steps=1, save_top_k=-1)
    _, _, error = fit(tmp_path, During(partial(signal.raise_signal, signal.SIGTERM), number=4), every)
    assert not list(tmp_path.rglob("interrupted.ckpt")) and "every/epoch=0-step=2.ckpt" in str(error)


def test_save_that_fails_behind_the_training_is_no_checkpoint(tmp_path, monkeypatch):
    def full(content, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lit_alignment.checkpoints.io.torch.save", full)
    every = ModelCheckpoint(tmp_path / "every", every_n_train_steps=1, save_top_k=-1)
    during = During(partial(signal.raise_signal, signal.SIGTERM), number=1)
    module = sft_module()
    with pytest.raises(Stopped) as caught:
        trainer(
            tmp_path, callbacks=[every, during, Interrupt()], plugins=[AsyncCheckpointIO()], enable_checkpointing=True
        ).fit(module, sft_data(module, chats(EXAMPLES), batch_size=2))
    assert "not saved where it stands" in str(caught.value) and "No checkpoint was saved." in str(caught.value)


def test_without_checkpoints_nothing_is_saved_and_none_is_promised(tmp_path):
    _, _, error = fit(tmp_path, During(partial(signal.raise_signal, signal.SIGTERM)), saver=False)
    assert str(error).startswith("stopped by SIGTERM: not saved where it stands (optimizer step 1, epoch 1).\n")
    assert "To go on" not in str(error)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_alignment.callbacks.interrupt.ONE_SIGNAL", -1.0)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was ignored")

    assert fit(tmp_path, During(twice))[2].code == 130


def test_signals_are_left_as_they_were(tmp_path):
    fit(tmp_path, max_steps=1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def on_rank(folder, rank_that_hears, resume):
    during = [During(partial(os.kill, os.getpid(), signal.SIGTERM), rank=rank_that_hears)] if resume is None else []
    options = {"devices": 2, "strategy": "ddp"}
    seen, module, error = fit(folder, *during, resume=resume, **options)
    rank = os.environ["RANK"]
    torch.save((seen.losses, weights(module), error and error.code), folder / f"{rank}-{resume is None}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("rank_that_hears", [0, 1, None])
def test_ranks_stop_before_the_same_micro_batch_whichever_of_them_is_asked(tmp_path, rank_that_hears):
    run_on_ranks(on_rank, tmp_path, rank_that_hears, None)
    (first, _, code), (other, _, other_code) = (torch.load(tmp_path / f"{rank}-True.pt") for rank in (0, 1))
    assert len(first) == len(other)
    if rank_that_hears is None:
        assert code is None and not (tmp_path / "ckpt/interrupted.ckpt").exists()
        return
    assert code == other_code == 143
    whole = tmp_path / "whole"
    whole.mkdir()
    run_on_ranks(on_rank, whole, None, None)
    run_on_ranks(on_rank, tmp_path, None, tmp_path / "ckpt/interrupted.ckpt")
    for rank in (0, 1):
        losses, _, _ = torch.load(tmp_path / f"{rank}-True.pt")
        rest, found, _ = torch.load(tmp_path / f"{rank}-False.pt")
        expected, end, _ = torch.load(whole / f"{rank}-True.pt")
        assert losses[: len(expected) - len(rest)] + rest == expected
        assert all(torch.equal(found[name], value) for name, value in end.items())


def test_a_second_signal_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_alignment.callbacks.interrupt.ONE_SIGNAL", -1.0)
    fit(tmp_path, During(partial(run_twice, signal.SIGTERM)))
    assert not list(tmp_path.rglob("interrupted.ckpt"))


def run_twice(number):
    signal.raise_signal(number)
    signal.raise_signal(number)


@pytest.mark.slow
def test_signals_to_workers_do_not_end_the_training_before_it_is_saved(tmp_path):
    """A terminal and a supervisor signal all processes of a group."""
    with ForkedCommand(tmp_path, *tiny(tmp_path, "--data.init_args.num_workers=2")) as process:
        wait_for_steps(tmp_path, process)
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in said, said
    assert saved(said).is_file()


def test_the_end_is_validated_and_saved_wherever_it_falls(tmp_path):
    saver = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    fit(tmp_path, saver, max_steps=3, saver=True)  # in the middle of an epoch of eight micro-batches
    (path,) = (tmp_path / "best").glob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 3 and saver.best_model_score is not None


def tiny(folder, *more):
    """A training that takes longer than any test."""
    options = {"max_epochs": 10_000, "default_root_dir": folder, "logger.init_args.save_dir": folder / "runs"}
    words = [f"--trainer.{name}={value}" for name, value in options.items()]
    return ["fit", "--config", "configs/sft/tiny.yaml", *words, *more]


def start(*arguments):
    # A shell starts what it puts into the background with SIGINT ignored, and the tests may have been started so.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "lit_alignment", *map(str, arguments)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **pipe)


def wait_for(there, process):
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.1)


def wait_for_steps(folder, process):
    wait_for(lambda: any(b"train/loss" in path.read_bytes() for path in folder.rglob("events*")), process)


def saved(said):
    """Where a stopped training was saved: now, or at the same step before by a ModelCheckpoint."""
    return Path(re.search(r"(?s): saved (\S+\.ckpt) .* --ckpt_path \1", said)[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_ends_with_a_checkpoint_a_message_and_its_exit_code(tmp_path, number):
    """From a new interpreter to its end, and forked."""
    begun = start(*tiny(tmp_path)) if number == signal.SIGINT else ForkedCommand(tmp_path, *tiny(tmp_path))
    with begun as process:
        wait_for_steps(tmp_path, process)
        os.kill(process.pid, number)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in said
    what = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    last = said[said.index(f"lit-alignment: error: {what}: saved ") :]
    assert last.splitlines()[-1].startswith("To go on: lit-alignment fit ")
    steps = torch.load(saved(last), weights_only=True)["global_step"]
    again = tiny(tmp_path, "--ckpt_path=newest", f"--trainer.max_steps={steps + 1}")
    assert main(again) == 0


@pytest.mark.slow
def test_ctrl_c_at_any_moment_loses_at_most_the_open_step_of_what_init_has_written(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["init", "sft", "--model", "tiny"]) == 0
    sources = {split: f"[{{path: {tmp_path}/sample_data/sft/test.jsonl}}]" for split in ("train", "val", "predict")}
    words = [f"--data.{split}={source}" for split, source in sources.items()]
    words += [f"--model.backbone.path={tmp_path}/sample_model/tiny", "--trainer.log_every_n_steps=1"]
    words += ["--trainer.max_epochs=10000", f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}"]
    with ForkedCommand(tmp_path, "fit", "--config", tmp_path / "sft.yaml", *words) as process:
        wait_for_steps(tmp_path, process)
        time.sleep(random.uniform(0, 3))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    last = int(re.findall(r"^step (\d+)/", said, re.M)[-1])
    assert last <= torch.load(saved(said), weights_only=True)["global_step"] <= last + 1


@pytest.mark.slow
def test_ctrl_c_during_imports_is_130(tmp_path):
    process = start(*tiny(tmp_path))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said, said


def test_ctrl_c_while_data_are_encoded_is_130(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ExampleMaker, "load", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(tiny(tmp_path)) == 130
    assert capsys.readouterr().err.strip().endswith("error: interrupted. What was written is kept.")


@pytest.mark.slow
def test_sigterm_in_predict_ends_it_and_keeps_what_is_answered(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(5000)]
    source = f"[{{path: {write_jsonl(tmp_path / 'p.jsonl', records)}}}]"
    words = ["predict", "--config", "configs/sft/tiny.yaml", f"--data.init_args.predict={source}"]
    writer = {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(tmp_path / "out")}}
    folder = f"--trainer.default_root_dir={tmp_path}"
    partial_file = lambda: [f for f in tmp_path.glob("out/*.partial0") if f.stat().st_size]  # noqa: E731
    with ForkedCommand(
        tmp_path, *words, "--trainer.callbacks", str([writer]), "--trainer.logger=false", folder
    ) as process:
        wait_for(partial_file, process)
        os.kill(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said and "stopped by SIGTERM" in said, said
    assert partial_file()


@pytest.mark.slow
def test_slurm_s_signal_saves_and_requeues_and_the_job_goes_on_from_there_alone(tmp_path, monkeypatch, capsys):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    (tools / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tools}:{os.environ['PATH']}"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    torch.save({"of": "another run"}, tmp_path / "hpc_ckpt_1.ckpt")  # Lightning loads it
    during = During(partial(signal.raise_signal, signal.SIGUSR1))
    _, _, error = fit(tmp_path, during, plugins=[SLURMEnvironment(), AtomicCheckpointIO()])
    assert error.code == 128 + signal.SIGUSR1
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "77"]
    assert (tmp_path / "ckpt/requeued-77.ckpt").is_file()
    init = {"dirpath": str(tmp_path / "ckpt")}
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init}
    command = tiny(tmp_path, "--trainer.callbacks", str([saver]))
    capsys.readouterr()
    assert main(command) == 2  # the job's own checkpoint is of a model with adapters
    assert "the checkpoint has adapters, and this run has none" in capsys.readouterr().err
    content = torch.load(tmp_path / "ckpt/requeued-77.ckpt", weights_only=True)
    content["lit_alignment"]["module"] = "Newer"
    torch.save(content, tmp_path / "ckpt/newer.ckpt")
    assert main(command) == 2 and "the checkpoint is of Newer" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert main([*command, "--trainer.max_steps=1"]) == 0  # another job begins
