import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lit_alignment.data.sources.choosing import choose_records, mixture_repeats, repeat_records, source_generator
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from tests.helpers import chats, write_jsonl


def test_jsonl_json_parquet_folder_and_inline_give_the_same_records(tmp_path):
    records = chats(5)
    write_jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "b.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", records[:2])
    write_jsonl(folder / "2.jsonl", records[2:])
    sources = [SourceConfig(str(tmp_path / name)) for name in ("a.jsonl", "b.json", "c.parquet", "folder")]
    for source in [*sources, SourceConfig(records=records)]:
        assert [raw for _, raw in source.read()] == records


def test_place_of_a_record_is_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [where for where, _ in SourceConfig(str(path)).read()] == [f"{path}:1", f"{path}:3"]


def test_malformed_line_names_file_line_and_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(RecordError, match=r"a\.jsonl:2: not valid JSON \(.* at column 6\)\. Write one JSON object"):
        list(SourceConfig(str(path)).read())


def test_other_broken_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.parquet").write_text("no")
    for name, words in (("a.jsonl", "not UTF-8"), ("b.json", "does not hold a list"), ("c.parquet", "not a Parquet")):
        with pytest.raises(RecordError, match=words):
            list(SourceConfig(str(tmp_path / name)).read())
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(ConfigError, match="unknown file type '.csv'"):
        list(SourceConfig(str(tmp_path / "d.csv")).read())
    with pytest.raises(FileNotFoundError, match="no such file"):
        SourceConfig(str(tmp_path / "nowhere.jsonl")).files()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give either 'path' or 'records'"),
        ({"path": "x", "num_samples": 1, "sample_rate": 0.5}, "not both"),
        ({"path": "x", "weight": 1.0, "repeat": 2.0}, "not both"),
        ({"path": "x", "sample_rate": 1.5}, "use a number in"),
        ({"path": "x", "repeat": 0.0}, "above 0"),
        ({"path": "x", "offset": -1}, "0 or more"),
    ],
)
def test_contradicting_source_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        SourceConfig(**settings)


def test_sampling_is_seeded_by_the_source_alone():
    first, second = SourceConfig("a.jsonl", num_samples=10), SourceConfig("b.jsonl", num_samples=10)
    alone = choose_records(first, 100, seed=1)
    choose_records(second, 100, seed=1)
    np.testing.assert_array_equal(choose_records(first, 100, seed=1), alone)
    assert list(choose_records(second, 100, seed=1)) != list(alone)
    assert list(choose_records(first, 100, seed=2)) != list(alone)
    assert len(set(alone)) == 10 and list(alone) == sorted(alone)


def test_offset_and_num_rows_are_taken_before_samples():
    assert list(choose_records(SourceConfig("a", offset=3, num_rows=4), 100, 0)) == [3, 4, 5, 6]
    assert list(choose_records(SourceConfig("a", offset=98), 100, 0)) == [98, 99]
    assert list(choose_records(SourceConfig("a", offset=200), 100, 0)) == []
    inside = choose_records(SourceConfig("a", offset=10, num_rows=20, num_samples=5), 100, 0)
    assert len(inside) == 5 and min(inside) >= 10 and max(inside) < 30
    kept = choose_records(SourceConfig("a", sample_rate=0.3), 10_000, 0)
    assert 2800 < len(kept) < 3200


def test_repeat_adds_whole_passes_and_a_random_part():
    indices = np.arange(10)
    found = repeat_records(indices, 2.5, source_generator(SourceConfig("a"), 0, "repeat"))
    counts = np.bincount(found, minlength=10)
    assert len(found) == 25 and set(counts) == {2, 3}
    assert len(repeat_records(indices, 0.5, source_generator(SourceConfig("a"), 0, "repeat"))) == 5
    assert len(repeat_records(np.arange(0), 2.0, source_generator(SourceConfig("a"), 0, "repeat"))) == 0


def test_weights_share_the_epoch_and_keep_its_length():
    """Sizes 100 and 300 with weights 1 and 1: 400 records in all, 200 of each, so repeats of 2 and 2/3."""
    sources = [SourceConfig("a", weight=1.0), SourceConfig("b", weight=1.0), SourceConfig("c", repeat=3.0)]
    assert mixture_repeats(sources, [100, 300, 50]) == pytest.approx([2.0, 2 / 3, 3.0])


def test_nulls_that_a_table_fills_in_are_dropped(tmp_path):
    """A row has all keys that any row has; in JSON a null is what somebody has written."""
    calls = [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "add", "arguments": {"x": 1}}]
    records = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    from_table = [raw["messages"][0]["tool_calls"][0] for _, raw in SourceConfig(str(tmp_path / "a.parquet")).read()]
    from_json = [raw for _, raw in SourceConfig(str(tmp_path / "a.jsonl")).read()]
    assert from_table == calls and from_json == records


def test_folder_that_datasets_has_saved_is_read(tmp_path):
    """Also that of an older passage index, with its embeddings."""
    rows = [{"title": f"t{i}", "text": f"text {i}", "embeddings": [0.5, float(i)]} for i in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "passages"))
    found = list(SourceConfig(str(tmp_path / "passages")).read())
    assert [raw for _, raw in found] == rows and found[2][0].endswith(".arrow[2]")


def test_file_that_is_no_arrow_is_named(tmp_path):
    (tmp_path / "x.arrow").write_text("no")
    with pytest.raises(RecordError, match="x.arrow: not an Arrow file"):
        list(SourceConfig(str(tmp_path / "x.arrow")).read())
