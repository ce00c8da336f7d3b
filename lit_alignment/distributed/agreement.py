"""Ranks agree on where to stop, without a word between devices while nobody asks."""

import time
from itertools import count

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

LEAST_PATIENCE = 10.0  # seconds that a rank waits at the point to stop at, besides three of its longest micro-batches
COMMIT, ABORT = "commit", "abort"
_numbers = count()  # ranks make their agreements in the same order


class Agreement:
    """One decision of all ranks: before which micro-batch they stop.

    A rank that is asked to stop says so in the store through which the ranks have found each other; each looks there
    before each micro-batch. The first that sees it proposes a point some micro-batches ahead, since others may be
    farther; a rank that has not passed the point agrees, and one that has passed it aborts the round. Whoever stands at
    the point waits until all have agreed, or, since a rank that has passed it may be waiting for this one, aborts the
    round after a while. The first of both words stands, and all obey it; the next round looks twice as far ahead.

    Args:
        rank: Of this process.
        world_size: Number of processes.
        lead: How many micro-batches a rank can be ahead of another, at first.
    """

    def __init__(self, rank: int, world_size: int, lead: int) -> None:
        """Nobody has asked."""
        self.store = PrefixStore(f"lit_alignment/stop/{next(_numbers)}", _get_default_store())
        self.rank, self.world_size, self.lead = rank, world_size, lead
        self.reached = False
        self._round = 0
        self._agreed = False
        self._longest, self._last = 0.0, time.monotonic()

    def stops(self, position: int, asked: int | None) -> int | None:
        """What was asked of some rank, if this is the point to stop at.

        Args:
            position: The micro-batch that comes next, by a number that ranks count alike.
            asked: What this rank was asked, if it was.
        """
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        if asked is not None and not self.store.check(["asked"]):
            self.store.set("asked", str(asked))
        if not self.store.check(["asked"]):
            return None
        while not self.reached:
            point = int(self._first("point", str(position + self.lead)))
            if position > point:
                self._first("word", ABORT)
            elif not self._agreed:
                self.store.set(f"{self._round}/{self.rank}", "agreed")
                self._agreed = True
            if position < point and not self.store.check([f"{self._round}/word"]):
                break
            word = self._word() if position == point else self._first("word", ABORT)
            if word == COMMIT:
                self.reached = position == point
                break
            self._round, self._agreed, self.lead = self._round + 1, False, 2 * self.lead
        return int(self.store.get("asked")) if self.reached else None

    def _first(self, key: str, value: str) -> str:
        """What was written first under a key of this round."""
        return str(self.store.compare_set(f"{self._round}/{key}", "", value).decode())

    def _word(self) -> str:
        """What becomes of this round, once that is known; the point is here."""
        ranks = [f"{self._round}/{rank}" for rank in range(self.world_size)]
        end = time.monotonic() + LEAST_PATIENCE + 3 * self._longest
        while time.monotonic() < end:
            if self.store.check(ranks):
                return self._first("word", COMMIT)
            if self.store.check([f"{self._round}/word"]):
                break
            time.sleep(0.01)
        return self._first("word", ABORT)
