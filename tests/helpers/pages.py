"""Tutorials, followed to the letter: files that a page shows are written, commands that it shows are run.

A block with a title (```yaml title="cpu.yaml") is a file. In a block of ```console, a line that begins with `$ ` is a
command, which a backslash at its end continues, and the lines up to the next command are what it says; `...` in these
stands for anything, also for lines. All other blocks are to read.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tests.helpers.commands import ForkedCommand, command

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
NUMBER = re.compile(r"(?<![A-Za-z_])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?: [kMG]\b)?")
DRAWN = re.compile(r"[\u2500-\u259f]+")  # lines and bars
PORT = "8000"  # of a server, on the pages


@dataclass
class Step:
    """A command, what the page says that it says, and what it has said."""

    command: str
    shown: list[str]
    said: str = ""

    def missing(self) -> list[str]:
        """Lines of the page, without its figures, that were not said."""
        said = [_fixed(line) for line in self.said.splitlines()]
        lines = [_fixed(line) for line in self.shown]
        patterns = [re.escape(line).replace(re.escape("..."), ".*") for line in lines if line.strip(" .")]
        return [pattern for pattern in patterns if not any(re.search(pattern, line) for line in said)]

    def figure(self, name: str) -> float:
        """The number behind a name in what was said."""
        return _number_behind(name, self.said)

    def claimed(self, name: str) -> float:
        """The number behind a name on the page."""
        return _number_behind(name, "\n".join(self.shown))


@dataclass
class Follower:
    """Follows a page in an empty folder.

    Args:
        folder: The folder; what the page does happens in it.
        instead: Texts of files and commands, and what takes their place.
        more: Options to add, by the command of lit-alignment.
        skipped: Beginnings of commands that are not run.
    """

    folder: Path
    instead: dict[str, str] = field(default_factory=dict)
    more: dict[str, list[str]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ("pip ",)

    @contextlib.contextmanager
    def follow(self, page: Path) -> Iterator[list[Step]]:
        """The steps that were made; servers of the page answer until the end."""
        steps = []
        with contextlib.ExitStack() as servers, contextlib.chdir(self.folder):
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.instead[f":{PORT}"] = f":{free.getsockname()[1]}"
                self.instead[f"--port {PORT}"] = f"--port {free.getsockname()[1]}"
            for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
                if title:
                    Path(title).write_text(self._replaced(text), encoding="utf-8")
                elif language == "console":
                    for step in read_steps(text):
                        if not step.command.startswith(self.skipped):
                            step.said = self._run(self._replaced(step.command), servers)
                            steps.append(step)
            yield steps

    def _replaced(self, text: str) -> str:
        for word, other in self.instead.items():
            text = text.replace(word, other)
        return text

    def _run(self, line: str, servers: contextlib.ExitStack) -> str:
        """What a command says."""
        program, *words = shlex.split(line)
        if program == "lit-alignment" and words[0] == "serve":
            return self._serve(words, servers)
        if program == "lit-alignment":
            result = command(*words, *self.more.get(words[0], []))
            assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
            return result.stdout + result.stderr
        if program == "python":
            return _script(words)
        result = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)  # noqa: S602  # the page's own
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    def _serve(self, words: list[str], servers: contextlib.ExitStack) -> str:
        """Start a server; what it says when it is ready."""
        words = [str(self.folder / word) if (self.folder / word).exists() else word for word in words]
        (place := self.folder / ".server").mkdir()
        server = servers.enter_context(ForkedCommand(place, *words))
        said = _waited(lambda: server.stdout.read(), "Ctrl-C ends", server)
        servers.callback(_interrupt, server)
        return said


def read_steps(text: str) -> list[Step]:
    """The commands of a console, each with what it says there."""
    steps: list[Step] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            steps.append(Step(line[2:], []))
        else:
            steps[-1].shown.append(line)
    return steps


def _fixed(line: str) -> str:
    """A line without its figures and what is drawn."""
    return " ".join(NUMBER.sub("#", DRAWN.sub(" ", line)).split())


def _number_behind(name: str, text: str) -> float:
    found = re.search(rf"{re.escape(name)}[^\d\n]*?(-?\d+(?:\.\d+)?)", DRAWN.sub(" ", text))
    assert found is not None, (name, text)
    return float(found[1])


def _script(words: list[str]) -> str:
    """What a Python script writes, run in this process."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out):
        runpy.run_path(words[0], run_name="__main__")
    return out.getvalue()


def _interrupt(server: ForkedCommand) -> None:
    """End it as Ctrl-C does."""
    os.kill(server.pid, signal.SIGINT)
    server.communicate(20)
    assert server.returncode == 0


def _waited(read: Callable[[], str], end: str, server: ForkedCommand) -> str:
    begin = time.monotonic()
    while end not in (said := read()):
        assert server.poll() is None and time.monotonic() - begin < 120, said
        time.sleep(0.05)
    return said
