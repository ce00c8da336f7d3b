import datetime
import decimal
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lit_alignment.data.multimodal.media import open_image
from lit_alignment.data.sources.choosing import choose_records, mixture_repeats, repeat_records, source_generator
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.sources.values import RecordLimitsConfig
from lit_alignment.errors import ConfigError, RecordError
from tests.helpers import chats, write_jsonl
from tests.helpers.commands import command


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


def test_text_that_is_cut_off_names_its_column_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "oops\n')
    with pytest.raises(RecordError, match=r":1: not valid JSON \(Unterminated string starting at column 7\)"):
        list(SourceConfig(str(path)).read())


def test_other_broken_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.parquet").write_text("no")
    for name, words in (("a.jsonl", "not UTF-8"), ("b.json", "does not hold a list"), ("c.parquet", "not a Parquet")):
        with pytest.raises(RecordError, match=words):
            list(SourceConfig(str(tmp_path / name)).read())
    (tmp_path / "d.xls").write_text("a,b")
    with pytest.raises(ConfigError, match="unknown file type '.xls'"):
        list(SourceConfig(str(tmp_path / "d.xls")).read())
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
        ({"path": "x", "weight": float("nan")}, "finite and above 0"),
        ({"path": ""}, "give either 'path' or 'records'"),
        ({"path": "x", "num_samples": -1}, "0 or more"),
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


def errors_of(path, **settings):
    with pytest.raises((RecordError, ConfigError, FileNotFoundError)) as caught:
        list(SourceConfig(str(path), **settings).read())
    return str(caught.value)


def test_line_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 3000 + '{"a": "é"}\n'.encode("latin-1"))
    assert f"{path}:3001: not UTF-8 text" in errors_of(path)
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    assert f"{path}:1: not UTF-8 text" in errors_of(path)


def test_line_without_an_end_is_refused_at_its_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "x" * 50}))
    assert "limits.length" in errors_of(path, limits=RecordLimitsConfig(length=40))
    assert [raw for _, raw in SourceConfig(str(path), limits=RecordLimitsConfig(length=60)).read()] == [{"a": "x" * 50}]


def test_data_set_with_several_splits_asks_for_one(tmp_path):
    parts = {name: datasets.Dataset.from_list([{"split": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert [raw for _, raw in SourceConfig(str(tmp_path / "saved"), split="test").read()] == [{"split": "test"}]
    for split in (None, "../train"):
        words = errors_of(tmp_path / "saved", split=split)
        assert "holds the splits test, train" in words and "Set 'split' to one of them" in words


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_values_of_tables_become_json_and_images_data_urls(name, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (3, 3)).save(picture)
    columns = {
        "image": [str(picture)],
        "label": pyarrow.array([decimal.Decimal("4.50")]),
        "meta": pyarrow.array([datetime.datetime(2026, 1, 31)], pyarrow.timestamp("ns")),
        "text": [b"bytes"],
    }
    table = datasets.Dataset(pyarrow.table(columns)).cast_column("image", datasets.Image())
    if name == "a.arrow":
        table = table.map(lambda row: row)  # embeds nothing: the path alone is kept
        table.save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    else:
        table.to_parquet(path := tmp_path / name)
    ((_, raw),) = SourceConfig(str(path)).read()
    assert raw["label"] == 4.5 and raw["meta"] == "2026-01-31T00:00:00" and raw["text"] == "bytes"
    assert open_image(raw["image"]).size == (3, 3)


def test_bytes_that_are_no_text_name_their_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2], "meta": [b"x", b"\xff"]}), tmp_path / "a.parquet")
    assert f"{tmp_path / 'a.parquet'}[1]: field 'meta' is 1 bytes that are no" in errors_of(tmp_path / "a.parquet")


def test_damaged_part_of_a_table_is_named_as_it_is_met(tmp_path):
    table = pyarrow.table({"a": [f"{i * 7919 % 1000}" for i in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500, write_page_checksum=True)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    whole = {"a.parquet": (tmp_path / "a.parquet").read_bytes(), "a.arrow": arrow.read_bytes()}
    for name, content in whole.items():
        damaged = tmp_path / "damaged" / name
        damaged.parent.mkdir(exist_ok=True)
        for share in (0.0, 0.3, 0.6, 0.99):
            damaged.write_bytes(content[: int(len(content) * share)])
            assert str(damaged) in errors_of(damaged)
    content, at = whole["a.parquet"], len(whole["a.parquet"]) // 2
    damaged = tmp_path / "damaged/b.parquet"
    damaged.write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    with pytest.raises(RecordError, match=r"b.parquet\[\d+\]: this row or one behind it cannot be decoded") as caught:
        list(SourceConfig(str(damaged)).read())
    assert caught.value.where != f"{damaged}[0]"


def test_paths_that_are_no_files_are_one_message(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    os.symlink(tmp_path / "loop.jsonl", tmp_path / "loop.jsonl")
    (tmp_path / "x.json.gz").write_bytes(b"")
    (tmp_path / "folder/b.jsonl").mkdir(parents=True)
    os.mkfifo(tmp_path / "folder/c.jsonl")
    assert "neither a file nor a folder" in errors_of(tmp_path / "a.jsonl")
    assert "neither a file nor a folder" in errors_of("/dev/zero")
    assert "no such file" in errors_of(tmp_path / "loop.jsonl")
    assert "Unpack it first" in errors_of(tmp_path / "x.json.gz")
    assert "no .jsonl, .json, .csv, .tsv, .parquet, .arrow file in this folder" in errors_of(tmp_path / "folder")
    for name in ("x" * 5000 + ".jsonl", "a\0b.jsonl", "~nobody/a.jsonl", "\ud800.jsonl"):
        assert "no such file" in errors_of(name)


def test_file_that_cannot_be_read_is_one_message(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    assert f"{path}: cannot be read (Permission denied)" in errors_of(path)


def test_limits_are_settings_of_a_source(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**chats(1)[0], "meta": [[[[1]]]]}])
    for depth, code in ((3, 2), (6, 0)):
        source = f"[{{path: {path}, limits: {{depth: {depth}}}}}]"
        result = command("inspect", "--config", "configs/sft/tiny.yaml", f"--data.init_args.train={source}")
        assert result.returncode == code, result.stderr
        assert (f"{path}:1: field 'meta" in result.stderr and "limits.depth" in result.stderr) == (depth == 3)
