"""Which faults does a training run survive, and is anything that was saved ever lost?

    python benchmarks/faults.py      # about 15 minutes on two CPU cores

A tiny model trains with a checkpoint after each step, and resumes from the newest one whenever it is started again. It
is killed at random moments, its disk is full, its newest checkpoint is damaged. Further rows are counted by the tests
that they name. Kills are sent to children of a process that has imported everything, so that they fall into training
and not into the start of Python.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import AtomicCheckpointIO, SFTDataModule, SFTModule
from lit_alignment.checkpoints.newest import newest_checkpoint
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import CheckpointError
from lit_alignment.models.loading import BackboneConfig

KILLS, FULL_DISKS, DAMAGES = 50, 20, 20
NUMBERS = 200_000  # in the checkpoint for which the disk is too small
STEPS = 4000  # more than 50 intervals of a fast machine
TESTS = [
    ("a node of two dies under torchrun and is started again", "tests/distributed/test_elastic.py"),
    (
        "a loss that is non-finite: stopped, or skipped, with the record",
        "tests/test_optimization.py -k non_finite_loss_stops",
    ),
    ("200 damaged inputs for each of 16 readers, files and configurations", "tests/test_fuzz.py"),
    ("kill -9 inside a save, 50 times", "tests/checkpoints/test_checkpoints.py -k kill_during"),
]


class Progress(Callback):
    """Writes each finished step into a file."""

    def __init__(self, folder: Path) -> None:
        """Keep the place."""
        self.file = folder / "steps.txt"

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        """Append the step."""
        with self.file.open("a") as file:
            file.write(f"{trainer.global_step}\n")


def train(folder: Path) -> None:
    """Start, or continue, and train to the end."""
    seed_everything(0, verbose=False)
    words = "the kitchen scale does not work please reply order urgent".split()
    generator = random.Random(0)
    records = [
        {
            "id": str(n),
            "messages": [
                {"role": "user", "content": " ".join(generator.choices(words, k=5))},
                {"role": "assistant", "content": " ".join(generator.choices(words, k=generator.choice((1, 9))))},
            ],
        }
        for n in range(64)
    ]
    module = SFTModule(BackboneConfig("configs/tiny", weights="random"))
    data = SFTDataModule(
        module.tokenizer,
        train=[SourceConfig(records=records)],
        encoding=EncodingConfig(max_length=128),
        packing=False,
        batch_size=4,
        cache_dir=str(folder / "cache"),
    )
    saver = ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_top_k=3, monitor="step", mode="max")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[saver, Progress(folder)],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        default_root_dir=folder,
        **quiet,
    )
    newest = newest_checkpoint(trainer)
    trainer.fit(module, data, ckpt_path=None if newest is None else str(newest))
    torch.save({name: p.detach() for name, p in module.named_parameters()}, folder / "final.pt")


def child(work: Callable[[], None]) -> int:
    """Run something in a child of this process, quietly."""
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)  # the parent's other threads are not there
    try:
        work()
    except CheckpointError:
        os._exit(3)
    except BaseException:
        os._exit(4)
    os._exit(0)


def wait(pid: int) -> int:
    """The child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def readable(folder: Path) -> list[int]:
    """Steps of the checkpoints that stand in a folder; each has to load."""
    return [AtomicCheckpointIO().load_checkpoint(path)["global_step"] for path in (folder / "saved").glob("*.ckpt")]


def kills(folder: Path, whole: Path) -> str:
    """Kill a run 50 times, let it end, and compare with one that was let alone."""
    generator, lost, saved, killed = random.Random(0), 0, 0, 0
    while killed < KILLS:
        pid = child(lambda: train(folder))
        time.sleep(generator.uniform(0.5, 3.0))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            break  # it was done before
        killed += 1
        now = max(readable(folder), default=0)
        lost += now < saved
        saved = now
        print(f"\rkilled {killed} times, at step {saved}", end="", file=sys.stderr, flush=True)
    code = wait(child(lambda: train(folder)))
    final, expected = torch.load(folder / "final.pt"), torch.load(whole / "final.pt")
    same = all(torch.allclose(final[name], value, rtol=1e-4, atol=1e-6) for name, value in expected.items())
    return f"{killed} | {lost} lost; the end is {'that' if same and code == 0 else 'NOT that'} of a run let alone"


def full_disks() -> str:
    """Let no file grow beyond a random size, as a full disk would, while a second checkpoint is written."""
    generator, kept, refused = random.Random(1), 0, 0
    for _ in range(FULL_DISKS):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            assert wait(child(partial(limited, folder, None))) == 0
            before = sorted(readable(folder))
            limit = generator.randint(1000, 4 * NUMBERS - 1000)
            refused += wait(child(partial(limited, folder, limit))) == 3
            kept += sorted(readable(folder)) == before
    return f"{FULL_DISKS} | {FULL_DISKS - kept} lost; {refused} ended with the one message"


def limited(folder: Path, limit: int | None) -> None:
    """Write a checkpoint, or another one while the disk is full."""
    name = "first" if limit is None else "second"
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    state = {"global_step": 1, "state_dict": {"x": torch.zeros(NUMBERS)}}
    AtomicCheckpointIO().save_checkpoint(state, folder / "saved" / f"{name}.ckpt")


def damages(whole: Path) -> str:
    """Cut or change the newest of three checkpoints at a random place; the one before has to be taken."""
    generator, right = random.Random(2), 0
    for _ in range(DAMAGES):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            shutil.copytree(whole / "saved", folder / "saved")
            paths = sorted((folder / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
            content = bytearray(paths[-1].read_bytes())
            place = generator.randrange(len(content) // 10, len(content) - 100)
            if generator.random() < 0.5:
                content = content[:place]
            else:
                for offset in range(64):
                    content[place + offset] ^= 255
            stamp = paths[-1].stat().st_mtime_ns
            paths[-1].write_bytes(content)
            os.utime(paths[-1], ns=(stamp, stamp))
            saver = ModelCheckpoint(folder / "saved")
            found = newest_checkpoint(Trainer(accelerator="cpu", logger=False, callbacks=[saver]))
            right += found == paths[-2]
    return f"{DAMAGES} | {DAMAGES - right} not noticed; otherwise the one before was taken"


def main() -> None:
    """Print a table."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "whole").mkdir()
        (root / "killed").mkdir()
        assert wait(child(lambda: train(root / "whole"))) == 0
        rows.append(f"kill -9 at a random moment of training | {kills(root / 'killed', root / 'whole')}")
        rows.append(f"the disk is full while a checkpoint is saved | {full_disks()}")
        rows.append(f"the newest checkpoint is cut off or changed | {damages(root / 'whole')}")
    for title, test in TESTS:
        command = [sys.executable, "-m", "pytest", *test.split()]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        last = run.stdout.strip().splitlines()[-1].split(" in ")[0]
        rows.append(f"{title} | `{test}` | {last if run.returncode == 0 else f'NOT PASSED: {last}'}")
    print("| fault | times | outcome |\n|---|---|---|")
    for row in rows:
        print(f"| {row} |")


if __name__ == "__main__":
    main()
