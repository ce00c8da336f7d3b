"""What one process does for all."""

from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch import Trainer

from lit_alignment.errors import AlignmentError

Value = TypeVar("Value")


def on_rank_zero(trainer: Trainer, run: Callable[[], Value]) -> Value:
    """What rank 0 gets from a function, on all ranks; where it raises, all stop.

    Raises:
        AlignmentError: What rank 0 has raised.
    """
    found: Value | AlignmentError | None = None
    if trainer.is_global_zero:
        try:
            found = run()
        except AlignmentError as error:
            found = error
    told: Value | AlignmentError = trainer.strategy.broadcast(found)  # type: ignore[assignment]
    if isinstance(told, AlignmentError):
        raise told
    return told
