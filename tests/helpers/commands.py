"""The command line: called in this process, which is quick; in a fork; and as a user does."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from threading import Thread
from typing import IO, Self

from lit_alignment.cli import main
from tests.helpers.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> CompletedProcess[str]:
    """Run `lit-alignment` in this process; a traceback is an exception."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _logging_to(err), _warnings_to(err):
        try:
            code = main(list(arguments))
        except SystemExit as stopped:  # a parser's
            code = int(stopped.code or 0)
    return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _logging_to(stream: io.StringIO) -> Iterator[None]:
    """What Lightning logs goes to the stream, at its level of a new process; both are put back after it."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [(logger.level, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.handlers = [logging.StreamHandler(stream)]
    try:
        yield
    finally:
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers = handlers


@contextlib.contextmanager
def _warnings_to(stream: io.StringIO) -> Iterator[None]:
    """Warnings are written as in a new process, not kept for pytest's summary."""

    def write(message, category, filename, lineno, file=None, line=None) -> None:
        stream.write(warnings.formatwarning(message, category, filename, lineno, line))

    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = write
        yield


class ForkedCommand:
    """`lit-alignment` in a process of its own, which leads a group, to be used as a `Popen`.

    It is forked from the process of the ranks, which has imported everything: a new one takes eight seconds to start.
    """

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder / "forked"
        self.folder.mkdir()
        words = list(map(str, arguments))
        self.thread = Thread(target=run_on_ranks, args=(_run_in_a_fork, self.folder, words), kwargs={"ranks": 1})
        self.thread.start()

    def __enter__(self) -> Self:
        while not (self.folder / "pid").exists():
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.pid = int((self.folder / "pid").read_text())
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread.is_alive():
            os.killpg(self.pid, signal.SIGKILL)
            self.thread.join()

    @property
    def stdout(self) -> IO[str]:
        return (self.folder / "said").open()

    @property
    def returncode(self) -> int:
        return int((self.folder / "code").read_text())

    def poll(self) -> int | None:
        return None if self.thread.is_alive() else self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for the end; what was written, as from a `Popen` whose errors go where the rest goes."""
        self.thread.join(timeout)
        assert not self.thread.is_alive()
        return self.stdout.read(), None


def _run_in_a_fork(folder: Path, arguments: list[str]) -> None:
    os.setsid()
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    (folder / "new").write_text(str(os.getpid()))
    (folder / "new").rename(folder / "pid")
    (folder / "code").write_text(str(main(arguments)))


def command_in_a_process(*arguments: str, **environment: str) -> CompletedProcess[str]:
    """Run `lit-alignment` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "lit_alignment", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=ROOT,
        check=False,
    )
