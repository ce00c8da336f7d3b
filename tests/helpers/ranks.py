"""Functions of the tests on gloo ranks, in processes that start in a moment.

They are forked from one process that has imported everything and run nothing: Python with torch, Lightning and
transformers takes eight seconds to start, and a fork of the tests' own process would inherit locked thread pools.
"""

import ctypes
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 300  # after which ranks have hung
# What jobs would import by themselves, each time; those of DeepSpeed take five seconds.
PRELOADED = [
    "pytest",
    "tests.helpers.rank_runs",
    "lit_alignment.trainer_cli",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "torch._subclasses.schema_check_mode",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.profiler._cupti_monitor",
]


def run_on_ranks(job: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Call a function on each rank, with a free port, and fail with what a rank said if it failed.

    Lightning finds the environment of a launcher and starts no process. One rank is a process without any of it.
    """
    try:
        failed = _parent().call(job, arguments, ranks)
    except BaseException:  # an interrupted test leaves an answer that nobody reads
        _parent().stop()
        _parent.cache_clear()
        raise
    assert not failed, failed


def kill_after_first(save: Callable[[], None], path: Path, seconds: float) -> None:
    """Fork a process that saves, and kill it a while after its first file is there."""
    child = os.fork()
    if child == 0:
        save()
    deadline = time.monotonic() + SECONDS / 2
    while not path.exists():
        assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


class _Parent:
    """The process that forks."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        words = [sys.executable, "-m", "tests.helpers.ranks", str(theirs.fileno())]
        self.process = subprocess.Popen(words, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()

    def call(self, job: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> str:
        """What the ranks that failed wrote; empty if none has."""
        self.connection.send((pickle.dumps((job, arguments)), dict(os.environ), ranks))
        return self.connection.recv()

    def stop(self) -> None:
        self.connection.close()  # it ends, with its children
        self.process.wait()


_parent = cache(_Parent)


def _serve(connection: Connection) -> None:
    """Fork the ranks of one job after another until the tests end."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # looked at when the library is imported
    for name in PRELOADED:
        importlib.import_module(name)
    with warnings.catch_warnings(action="ignore"):
        _fill_caches()
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    assert [name for name in names[1:] if name != "jemalloc_bg_thd"] == [], names  # those of jemalloc survive a fork
    gc.freeze()
    while True:
        try:
            job, environment, ranks = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
            probe.close()
            files = [Path(folder) / str(rank) for rank in range(ranks)]
            children = {_fork(job, environment, rank, ranks, file): file for rank, file in enumerate(files)}
            connection.send(_attend(connection, children))


def _fill_caches() -> None:
    """Load adapters and an image encoder, and hash our code, once for all ranks: it was half of the time of most."""
    from tests import helpers

    sft, vlm = helpers.sft_module(lora=True), helpers.vlm_module()
    for module in (sft, vlm):
        module.load_model()
    vlm.load_towers()
    for data in (
        helpers.sft_data(sft, []),
        helpers.class_data(helpers.classifier()),
        helpers.reward_data(helpers.reward_model()),
        helpers.preference_data(helpers.preference_module()),
        helpers.rag_data(helpers.rag_module(None)),
        helpers.vlm_data(vlm),
    ):
        data._maker(prompts=False)


def _attend(connection: Connection, children: dict[int, Path]) -> str:
    """Wait for all ranks; after one has failed the others are not waited for."""
    deadline, failed, killed = time.monotonic() + SECONDS, [], False
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            file = children.pop(pid)
            if status and not killed:
                failed.append(f"{file.name}: {os.waitstatus_to_exitcode(status)}\n{file.read_text()[-3000:]}")
                deadline = min(deadline, time.monotonic() + 2)  # time for the others to say what they know
        elif connection.poll(0.01):  # the tests have ended
            deadline = 0
        if children and not killed and time.monotonic() > deadline:
            if not failed:
                failed = [f"{file.name} hangs\n{file.read_text()[-3000:]}" for file in children.values()]
            for child in children:
                os.kill(child, signal.SIGKILL)
            killed = True
    return "\n".join(failed)


def _fork(job: bytes, environment: dict[str, str], rank: int, ranks: int, file: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank is left behind
        said = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.clear()
        os.environ.update(environment)
        if ranks > 1:
            os.environ.update(NODE_RANK="0", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(ranks))
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        rank_zero_only.rank = rank  # which Lightning reads once, when it is imported
        function, arguments = pickle.loads(job)
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
