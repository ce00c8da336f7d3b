"""Where things are kept outside a run."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$LIT_ALIGNMENT_CACHE`, or `lit_alignment` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LIT_ALIGNMENT_CACHE") or Path(base) / "lit_alignment").expanduser()
