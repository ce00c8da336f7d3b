"""Where things are kept outside a run."""

import os
from pathlib import Path

from lit_alignment.errors import ConfigError


def cache_dir() -> Path:
    """`$LIT_ALIGNMENT_CACHE`, or `lit_alignment` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LIT_ALIGNMENT_CACHE") or Path(base) / "lit_alignment").expanduser()


def local_path(name: str) -> str:
    """Where a model's files are: a folder as it stands, a fetched copy in the cache, or the hub's own name.

    Raises:
        ConfigError: If the name can only be a folder, and there is none.
    """
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    fetched = cache_dir() / "models" / name.replace("/", "--")
    if (fetched / "config.json").is_file():
        return str(fetched)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name}: no such model folder (looked from {Path.cwd()}). Check backbone.path.")
    return name
