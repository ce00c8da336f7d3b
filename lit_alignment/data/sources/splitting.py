"""Which records of a source are held out for validation."""

import numpy as np
from numpy.typing import NDArray


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
