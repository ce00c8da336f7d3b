"""The command line: called in this process, which is quick, and as a user does."""

import contextlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

from lit_alignment.cli import main

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
