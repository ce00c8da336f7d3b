"""Which records of a source are held out for validation."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError


def check_fraction(fraction: float, train: Sequence[SourceConfig], val: Sequence[SourceConfig]) -> None:
    """Refuse a part that cannot be held out.

    Args:
        fraction: `data.val_fraction`.
        train: Sources of training.
        val: Of validation.

    Raises:
        ConfigError: Naming the setting.
    """
    if not 0 <= fraction <= 0.5:
        raise ConfigError(f"data.val_fraction is {fraction}; use a number from 0 to 0.5.")
    if fraction and val:
        raise ConfigError(f"data.val_fraction is {fraction}, and data.val has sources. Give one of them.")
    paths = [source.path for source in train if source.path is not None]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if fraction and twice is not None:
        raise ConfigError(
            f"data.val_fraction: data.train has {twice} twice, so a record held out of one could be trained by the "
            "other. Give it once, with 'repeat' or 'weight'; or give data.val."
        )


def held_out(classes: NDArray[np.float64], fraction: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a part of the records of each class; a class of one record stays whole, so that it is trained.

    The records are put in order by class, at random within it, and every (1 / fraction)-th is taken: the total is
    exact, and that of each class to one record.

    Args:
        classes: Of each record, [N]; all alike where there are none.
        fraction: Part to draw, at most a half.
        generator: Draws.

    Returns:
        Whether each record is held out, [N].
    """
    _, which, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(sizes[which] > 1)
    order = candidates[np.lexsort((generator.random(len(candidates)), which[candidates]))]
    until = np.floor(fraction * np.arange(len(order) + 1) + 0.5)
    held = np.zeros(len(classes), dtype=bool)
    held[order[np.diff(until) > 0]] = True
    return held
