"""Where things are kept outside a run."""

import os
import shlex
import socket
import threading
import urllib.request
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from lit_alignment.errors import ConfigError


def cache_dir() -> Path:
    """`$LIT_ALIGNMENT_CACHE`, or `lit_alignment` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LIT_ALIGNMENT_CACHE") or Path(base) / "lit_alignment").expanduser()


def fetched_path(name: str) -> Path:
    """Where `lit-alignment fetch` puts a model of the hub."""
    return cache_dir() / "models" / name.replace("/", "--")


def recipes_dir() -> Path:
    """Where the recipes are: in an installed package, or in the checkout around it."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


def shown(path: Path) -> str:
    """A path as a word of a command, from the working folder where it is inside of that."""
    whole = Path(os.path.abspath(path))
    return shlex.quote(str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else path))


def local_path(name: str, setting: str = "backbone.path") -> str:
    """Where a model's files are: a folder as it stands, a fetched copy in the cache, or the hub's own name.

    Args:
        name: A folder, or a name on the hub.
        setting: Where the name is given, for messages.

    Raises:
        ConfigError: If the name can only be a folder, and there is none.
    """
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    fetched = fetched_path(name)
    if (fetched / "config.json").is_file():
        return str(fetched)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name}: no such model folder (looked from {Path.cwd()}). Check {setting}.")
    look_for_hub()
    return name


def suggestion(name: str, otherwise: str) -> str:
    """What to say of a name that is no model here: whether it is the tiny one of `init`, which has no weights.

    Args:
        name: As it was given.
        otherwise: What to say of other names.
    """
    written = Path("sample_model", name)
    if (written / "config.json").is_file():
        return f"Did you mean {written}? It has no weights yet: train it, and give the checkpoint."
    if name == "tiny":
        return "`lit-alignment init METHOD --model tiny` writes a tiny model to train; give its checkpoint."
    return otherwise


@cache
def look_for_hub(seconds: float = 4.0) -> str:
    """Why the hub, or the mirror in HF_ENDPOINT, cannot be asked; empty if it can. Looked for once.

    Where it cannot, the libraries are told to be offline: they find what they have kept, and else give up at once
    instead of after a minute of attempts.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme in urllib.request.getproxies():  # it is the proxy that knows
        return ""
    answers = threading.Event()

    def ask() -> None:
        try:
            socket.create_connection((parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443))).close()
        except OSError:
            return
        answers.set()

    # In a thread, since looking up a name cannot be given a time.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if answers.is_set():
        return ""
    import datasets

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return f"{constants.ENDPOINT} cannot be reached"
