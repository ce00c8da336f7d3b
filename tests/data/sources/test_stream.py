from collections import Counter
from itertools import islice

import numpy as np
import pytest

from lit_alignment.data.sources.choosing import choose_records
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.sources.stream import RecordStream, check_stream, shuffled
from lit_alignment.errors import ConfigError, RecordError


def source(name, number, **settings):
    return SourceConfig(records=[{"id": f"{name}{i}"} for i in range(number)], name=name, **settings)


def taken(stream, number, mark=None):
    return list(islice(stream.records(mark or stream.begin), number))


def ids(records):
    return [record.raw["id"] for record in records]


def test_every_record_is_seen_once_in_a_pass():
    stream = RecordStream([source("a", 20), source("b", 7)], seed=0, buffer=8)
    first, second = (ids(taken(stream, 54))[start : start + 27] for start in (0, 27))
    expected = {f"a{i}" for i in range(20)} | {f"b{i}" for i in range(7)}
    assert set(first) == set(second) == expected and len(first) == 27
    assert first != second
    assert first[0][0] != first[1][0] or first[1][0] != first[2][0]  # the sources are mixed
    assert ids(taken(RecordStream(stream.sources, 1, 8), 27)) != first
    assert ids(taken(RecordStream([source("a", 5)], 0, buffer=1), 5)) == ["a0", "a1", "a2", "a3", "a4"]


@pytest.mark.parametrize("weights", [(None, None), (3.0, 1.0)])
def test_stream_goes_on_at_any_mark(weights):
    """Also where a source has ended in the pass, and where one has begun anew."""
    sources = [source(name, size, weight=w) for name, size, w in zip("ab", (6, 3), weights, strict=True)]
    stream = RecordStream(sources, seed=3, buffer=4)
    whole = taken(stream, 60)
    for position in range(0, 40):
        rest = taken(stream, 20, whole[position].behind)
        assert rest == whole[position + 1 : position + 21]


def test_weights_say_how_often_a_source_is_drawn():
    stream = RecordStream([source("a", 11, weight=3.0), source("b", 5, weight=1.0)], seed=0, buffer=4)
    found = ids(taken(stream, 2000))
    assert Counter(name[0] for name in found)["a"] / 2000 == pytest.approx(0.75, abs=0.03)
    counts = Counter(found)
    for name, size in (("a", 11), ("b", 5)):
        own = [counts[f"{name}{i}"] for i in range(size)]
        assert max(own) - min(own) <= 1  # each goes through its records again and again


def test_buffer_draws_from_as_many_records():
    found = list(shuffled(range(100), 10, np.random.default_rng(0)))
    assert sorted(found) == list(range(100)) and found != list(range(100))
    assert all(item < index + 10 for index, item in enumerate(found))


def test_choice_is_that_of_data_in_memory():
    chosen = source("a", 100, offset=7, num_rows=60, sample_rate=0.3)
    found = [record.position for record in taken(RecordStream([chosen], 5, buffer=1), 10)]
    assert found == choose_records(chosen, 100, 5)[:10].tolist()


def test_what_needs_the_number_of_records_is_refused():
    for sources, words in (
        ([source("a", 3, num_samples=2)], "'num_samples' needs the number of records"),
        ([source("a", 3, repeat=2.0)], "'repeat' needs"),
        ([source("a", 3, weight=2.0), source("b", 3)], "source b: has no 'weight'"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_stream(sources, 10)
    with pytest.raises(ConfigError, match="shuffle_buffer is 0"):
        check_stream([source("a", 3)], 0)


def test_source_that_gives_nothing_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ConfigError, match="source 'a' .* holds no records"):
        taken(RecordStream([SourceConfig(str(tmp_path / "a.jsonl"))], 0, 4), 1)
    (tmp_path / "b.jsonl").write_text('{"id": 1}\nno\n')
    with pytest.raises(RecordError, match="b.jsonl:2: not valid JSON"):
        taken(RecordStream([SourceConfig(str(tmp_path / "b.jsonl"))], 0, 1), 2)
