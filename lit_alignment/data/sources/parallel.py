"""One function over many items, in several processes, in order."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 64  # items that travel to a process together
FEW = 2000  # items that are computed sooner than processes are started
AHEAD = 2  # blocks in flight for each process; more would fill the memory where the items are read faster

_function: Callable[[Any], Any] = repr  # of a worker process; a fork brings it along, so that it is never pickled


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_proc: int | None = None
) -> Iterator[Result]:
    """What `function` makes of each item, in their order; never more than a few blocks of them are in memory.

    Args:
        function: Anything callable. Items, results and errors travel between processes; the function does not.
        items: Read by this process, as they are needed.
        num_proc: Processes that compute; 1 computes here, and so does a system that cannot fork. None computes the
            first items here, and those behind them in as many processes as there are cores.
    """
    items = iter(items)
    if num_proc is None:
        yield from map(function, islice(items, FEW))
        num_proc = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_proc < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, items)
        return
    pending: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), _start, (function,)) as pool:
        try:
            while block := list(islice(items, BLOCK)):
                pending.append(pool.submit(_compute, block))
                if len(pending) > AHEAD * num_proc:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:  # after an error nobody waits for what is in flight
            for future in pending:
                future.cancel()


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _compute(block: list[Any]) -> list[Any]:
    return [_function(item) for item in block]
