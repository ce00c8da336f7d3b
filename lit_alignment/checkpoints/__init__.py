"""Everything that writes or reads a checkpoint."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "newest_checkpoint":  # stood in a module of this name in version 0.1
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from lit_alignment.checkpoints.newest import newest_checkpoint

    return newest_checkpoint
