"""Which faults does a training run survive, and is anything that was saved ever lost?

    python -m benchmarks.faults              # about 20 minutes on two CPU cores
    python -m benchmarks.faults --kills 10   # the first of the kills alone

Tiny models of every method train in one process, under DDP and FSDP2 on two ranks, with dropout, workers and
accumulation. Each run is killed at a random moment, drawn with a fixed seed, and resumes from its newest checkpoint; a
third of them is killed once more. Its final weights have to be, to the bit, those of a run that was let alone. Then the
disk is full, and the newest checkpoint is damaged. Malformed and hostile files, full disks under every command that
writes, and signals at every phase are those of `benchmarks.hostile`. Further rows are counted by the tests that they
name. Kills are sent to children of a process that has imported everything, so that they fall into training and not into
the start of Python.
"""

import argparse
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig

from benchmarks import hostile
from lit_alignment import AtomicCheckpointIO, FSDP2Strategy, SFTModule
from lit_alignment.checkpoints.newest import newest_checkpoint
from lit_alignment.checkpoints.sharded import full
from lit_alignment.errors import CheckpointError
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import IndexConfig
from tests.helpers import (
    chats,
    class_data,
    classifier,
    encoded_index,
    knowledge,
    labelled,
    pairs,
    rag_data,
    rag_module,
    reward_data,
    reward_model,
    seen,
    sft_data,
    trainer,
    vlm_data,
    vlm_module,
)

KILLS, FULL_DISKS, DAMAGES = 60, 20, 20
METHODS = ("sft", "classification", "reward", "rag", "vlm")
EPOCHS = 3
NUMBERS = 200_000  # in the checkpoint for which the disk is too small
TESTS = [
    ("a node of two dies under torchrun and is started again", "tests/distributed/test_elastic.py"),
    (
        "a loss that is non-finite: stopped, or skipped, with the record",
        "tests/test_optimization.py -k non_finite_loss_stops",
    ),
    ("damaged records of 18 forms, files and configurations", "tests/data/test_malformed.py tests/test_fuzz.py"),
    ("kill -9 inside a save, 50 times", "tests/checkpoints/test_checkpoints.py -k kill_during"),
]


@dataclass(frozen=True)
class Case:
    """One kind of run.

    Args:
        method: What is trained.
        strategy: `one` process, or `ddp` or `fsdp2` on two ranks.
        accumulate: Micro-batches of an optimizer step.
        inside: Whether each micro-batch is saved, windows or not; else each optimizer step.
        workers: Processes that build batches.
    """

    method: str
    strategy: str
    accumulate: int
    inside: bool
    workers: int

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return 1 if self.strategy == "one" else 2


def cases() -> list[Case]:
    """The kinds of the kills: twelve of each method, ten on two ranks each way, in a random order."""
    found = []
    for number in range(KILLS):
        strategy = "ddp" if number < 10 else "fsdp2" if number < 20 else "one"
        accumulate = (1, 2, 3)[number % 3]
        inside = accumulate > 1 and number % 2 == 0
        found.append(Case(METHODS[number % 5], strategy, accumulate, inside, int(number % 4 == 3)))
    random.Random(0).shuffle(found)
    return found


def build(case: Case, folder: Path) -> tuple[Any, Any]:
    """Module and data of a run."""
    seed_everything(0, verbose=False)
    settings = {
        "packing": False,
        "batch_size": 2,
        "num_workers": case.workers,
        "cache_dir": str(folder.parent / "cache"),
    }
    match case.method:
        case "sft":
            peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
            optimizer = OptimizerConfig(learning_rate=1e-2)
            module = SFTModule(BackboneConfig("configs/tiny", weights="random"), peft, optimizer=optimizer)
            return module, sft_data(module, chats(29), chats(4, seed=1), **settings)
        case "classification":
            model = classifier(lora=True)
            return model, class_data(model, labelled(29), labelled(4, seed=1), **settings)
        case "reward":
            scorer = reward_model(lora=True)
            return scorer, reward_data(scorer, pairs(29), pairs(4, seed=1), **settings)
        case "rag":
            rag = rag_module(IndexConfig(str(folder / "index")), lora=True, num_passages=2)
            return rag, rag_data(rag, chats(15, longest=6), chats(2, seed=1), **settings)
    seeing = vlm_module(True)
    return seeing, vlm_data(seeing, *json.loads((folder / "pictures.json").read_text()), **settings)


def prepare(folder: Path, case: Case) -> None:
    """Write what all processes of a run read."""
    if case.method == "rag":
        encoded_index(folder, knowledge(6))
    if case.method == "vlm":
        (folder / "pictures.json").write_text(json.dumps([seen(folder, 15), seen(folder, 2, seed=1)]))


def train(folder: Path, case: Case) -> None:
    """Start, or continue from the newest checkpoint, and train to the end."""
    module, data = build(case, folder)
    every: dict[str, Any] = {"train_time_interval": timedelta(0)} if case.inside else {"every_n_train_steps": 1}
    saver = ModelCheckpoint(folder / "saved", "saved", enable_version_counter=False, **every)
    strategies: dict[str, Callable[[], Any]] = {
        "one": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: FSDP2Strategy(process_group_backend="gloo"),
    }
    runner = trainer(
        folder,
        strategy=strategies[case.strategy](),
        devices=case.ranks,
        accumulate_grad_batches=case.accumulate,
        val_check_interval=3,
        max_epochs=EPOCHS,
        callbacks=[saver],
        enable_checkpointing=True,
    )
    newest = newest_checkpoint(runner)
    runner.fit(module, data, ckpt_path=None if newest is None else str(newest))
    final = {name: full(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
    if runner.is_global_zero:
        torch.save(final, folder / "final.pt")


def child(work: Callable[[], None], environment: dict[str, str] | None = None) -> int:
    """Run something in a child of this process, quietly."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(os.environ.get("FAULTS_LOG", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment or {})
    rank_zero_only.rank = int(os.environ.get("RANK", 0))  # type: ignore[attr-defined]
    torch.set_num_threads(1)  # the parent's other threads are not there
    try:
        work()
    except CheckpointError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(4)
    os._exit(0)


def wait(pid: int) -> int:
    """The child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start(folder: Path, case: Case) -> list[int]:
    """The processes of a run."""
    if not folder.exists():
        folder.mkdir(parents=True)
        wait(child(partial(prepare, folder, case)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = range(case.ranks)
    size = {"WORLD_SIZE": str(case.ranks), "NODE_RANK": "0"} if case.ranks > 1 else {}
    own = [place | size | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size else {}) for rank in ranks]
    return [child(partial(train, folder, case), environment) for environment in own]


def end(folder: Path, case: Case) -> bool:
    """Let a run end, and say whether all its processes did so well."""
    pids = set(start(folder, case))
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status:
            for other in pids:
                os.kill(other, signal.SIGKILL)
                wait(other)
            return False
    return True


def kill(folder: Path, case: Case, seconds: float) -> None:
    """Start a run, and kill all of its processes after a while."""
    pids = start(folder, case)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait(pid)


def readable(folder: Path) -> list[int]:
    """Steps of the checkpoints that stand in a folder; each has to load."""
    return [AtomicCheckpointIO().load_checkpoint(path)["global_step"] for path in (folder / "saved").glob("*.ckpt")]


def kills(root: Path, number: int) -> str:
    """Kill runs, let them end, and compare each with one that was let alone."""
    generator = random.Random(0)
    alone: dict[Case, tuple[Path, float]] = {}
    counts: Counter[str] = Counter()
    for index, case in enumerate(cases()[:number]):
        if case not in alone:
            begin = time.monotonic()
            assert end(root / f"alone-{index}", case), case
            alone[case] = root / f"alone-{index}", time.monotonic() - begin
        whole, seconds = alone[case]
        folder = root / f"killed-{index}"
        for _ in range(1 + int(index % 3 == 0)):
            steps = max(readable(folder), default=0)
            kill(folder, case, generator.uniform(0.3, 0.95) * seconds)
            counts["kills"] += 1
            counts["lost"] += max(readable(folder), default=0) < steps
            counts["before the first checkpoint"] += not readable(folder)
        counts["did not resume"] += not end(folder, case)
        final = torch.load(folder / "final.pt") if (folder / "final.pt").exists() else {}
        expected = torch.load(whole / "final.pt")
        same = final.keys() == expected.keys() and all(torch.equal(final[name], expected[name]) for name in expected)
        counts["different"] += not same
        counts.update([case.method, case.strategy])
        counts["accumulation"] += case.accumulate > 1
        counts["saves inside of windows"] += case.inside
        counts["workers"] += case.workers > 0
        if not same:
            print(f"\n{case}: the weights differ", file=sys.stderr, flush=True)
        print(f"\r{index + 1} runs, {counts['different']} different", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr, flush=True)  # below the count
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{counts['kills']} | {number} runs: {shown}"


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


def damages() -> str:
    """Cut or change the newest of three checkpoints at a random place; the one before has to be taken."""
    generator, right = random.Random(2), 0
    for _ in range(DAMAGES):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            paths = [folder / "saved" / f"{number}.ckpt" for number in range(3)]
            for number, path in enumerate(paths):
                AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.rand(5000)}}, path)
                os.utime(path, (number, number))
            content = bytearray(paths[-1].read_bytes())
            place = generator.randrange(len(content) // 10, len(content) - 100)
            if generator.random() < 0.5:
                content = content[:place]
            else:
                for offset in range(64):
                    content[place + offset] ^= 255
            paths[-1].write_bytes(content)
            os.utime(paths[-1], (9, 9))
            saver = ModelCheckpoint(folder / "saved")
            found = newest_checkpoint(Trainer(accelerator="cpu", logger=False, callbacks=[saver]))
            right += found == paths[-2]
    return f"{DAMAGES} | {DAMAGES - right} not noticed; otherwise the one before was taken"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="so many kills alone")
    number = parser.parse_args().kills
    begin = time.monotonic()
    print("| fault | times | outcome |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        row = kills(Path(temporary), number or KILLS)
    minutes = (time.monotonic() - begin) / 60
    print(f"| kill -9 at a random moment of training | {row}, {minutes:.0f} min |", flush=True)
    if number is not None:
        return
    print(f"| the disk is full while a checkpoint is saved | {full_disks()} |", flush=True)
    print(f"| the newest checkpoint is cut off or changed | {damages()} |", flush=True)
    for title, row in hostile.rows():
        print(f"| {title} | {row} |", flush=True)
    for title, test in TESTS:
        command = [sys.executable, "-m", "pytest", *test.split()]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        last = run.stdout.strip().splitlines()[-1].split(" in ")[0]
        outcome = last if run.returncode == 0 else f"NOT PASSED: {last}"
        print(f"| {title} | `{test}` | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
