import os

import pytest

from lit_alignment.data.sources.parallel import AHEAD, BLOCK, ordered_map
from lit_alignment.errors import RecordError


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_the_order_of_the_items(num_proc):
    assert list(ordered_map(lambda x: x * x, range(500), num_proc)) == [x * x for x in range(500)]


def test_items_are_computed_in_other_processes():
    assert os.getpid() not in set(ordered_map(lambda _: os.getpid(), range(10), 2))


def test_items_are_read_as_they_are_needed():
    """Whatever the number of items, only some blocks of them are in memory."""
    read = []
    items = (read.append(number) or number for number in range(100_000))
    results = ordered_map(lambda x: x, items, 2)
    assert next(results) == 0
    assert len(read) <= (2 * AHEAD + 1) * BLOCK
    results.close()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_error_of_an_item_is_raised_as_it_is(num_proc):
    def check(number):
        if number == 70:
            raise RecordError("a.jsonl:71", "id", "is wrong", "Change it.")
        return number

    with pytest.raises(RecordError, match="a.jsonl:71: field 'id' is wrong. Change it."):
        list(ordered_map(check, range(10_000), num_proc))
