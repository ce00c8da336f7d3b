import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_alignment import ClassificationDataModule, RewardDataModule, SFTDataModule
from lit_alignment.data.sources.columns import UnusableRecord
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from tests.helpers import chats, write_jsonl

REVIEWS = [
    ("It leaks, twice a day", 1),
    ('They call it "robust"', 5),
    ("Two lines\nof praise", 4),
    ("Fair; no more", 3),
]
ROWS = [{"review": text, "stars": stars, "shop": "north"} for text, stars in REVIEWS]
COLUMNS = {"text": "review", "label": "stars"}


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def records_of(path, **settings):
    return [raw for _, raw in SourceConfig(str(path), **settings).read()]


def error_of(path, **settings):
    with pytest.raises((RecordError, ConfigError)) as caught:
        records_of(path, **settings)
    return str(caught.value)


def encoded(module, path, **settings):
    data = module(train=[SourceConfig(str(path), **settings)])
    data.setup("fit")
    return data


@pytest.fixture
def classifier(tokenizer):
    return lambda **settings: ClassificationDataModule(tokenizer, labels=["1", "2", "3", "4", "5"], **settings)


def test_tables_of_every_kind_hold_the_same_records(tmp_path):
    write_csv(tmp_path / "a.csv", ROWS)
    write_csv(tmp_path / "b.tsv", ROWS, "\t")
    write_csv(tmp_path / "c.csv", ROWS, ";")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    write_jsonl(tmp_path / "e.jsonl", ROWS)
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    expected = [{"text": text, "label": stars} for text, stars in REVIEWS]
    for name in ("a.csv", "b.tsv", "c.csv", "d.parquet", "e.jsonl", "f.csv.gz", "saved"):
        assert records_of(tmp_path / name, columns=COLUMNS) == expected, name


def test_compressed_lines_are_those_of_the_file(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in chats(50)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(lines[:700]) + gzip.compress(lines[700:])
    )  # as `cat` joins them
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(lines)
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        source = SourceConfig(str(tmp_path / name))
        found = list(source.read())
        assert [raw for _, raw in found] == chats(50) and found[3][0] == f"{tmp_path / name}:4"
        assert source.title == name[0]
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-100])
    assert f"{tmp_path / 'cut.jsonl.gz'}: cannot be read" in error_of(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": "\xe9"}\n'))
    assert f"{tmp_path / 'latin.jsonl.gz'}:2: not UTF-8 text" in error_of(tmp_path / "latin.jsonl.gz")


def test_message_is_made_of_columns(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS)
    (first, *_) = records_of(path, columns={"text": "Classify ({shop}, {stars} {{stars}}): {review}", "label": "stars"})
    assert first == {"text": "Classify (north, 1 {stars}): It leaks, twice a day", "label": 1}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    (first, *_) = records_of(tmp_path / "b.parquet", columns={"prompt": "review", "completion": "{stars}"})
    assert first == {"prompt": "It leaks, twice a day", "completion": "1"}


def test_missing_column_names_the_nearest_and_all(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS)
    words = "no column is named 'reviews' (there are: 'review', 'stars', 'shop'). Did you mean 'review'? Set the"
    assert error_of(path, columns={"text": "reviews"}).startswith(f"{path}: {words}")
    assert "no column is named 'Review'" in error_of(path, columns={"text": "Classify: {Review}"})
    lines = write_jsonl(tmp_path / "b.jsonl", [ROWS[0], {"stars": 1}])
    assert error_of(lines, columns=COLUMNS).startswith(f"{lines}:2: no column is named 'review' (there are: 'stars')")
    assert "use one of alpaca, hh, sharegpt, ultrafeedback" in error_of(path, columns="alpacca")
    assert "write {field: column}" in error_of(path, columns={"text": ""})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1,2\n1,2,3\n", ":3: the row has 3 cells, and the header 2. Quote cells"),
        ("a,b\n1,2\n\n\n1\n", ":5: the row has 1 cells"),
        ('a,b\n"1\n2",3\n"4,5\n', ":4: not a row of a table (unexpected end of data). Close quotes"),
        ("a,b,a\n1,2,3\n", ":1: two columns are named 'a'"),
    ],
)
def test_row_that_is_none_names_its_line(content, words, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert error_of(path).startswith(f"{path}{words}")


def test_cells_that_are_empty_or_of_another_type_are_counted(tmp_path, classifier, tokenizer):
    rows = [*ROWS, {"review": " ", "stars": 2, "shop": ""}, {"review": "No stars", "stars": "", "shop": "south"}]
    data = encoded(classifier, write_csv(tmp_path / "a.csv", rows), columns=COLUMNS)
    report = data.reports["train"]
    assert (report.examples, report.dropped, report.sources) == (4, {"empty_cell": 2}, {"a": 6})
    assert report.details["empty_cell"] == f"{tmp_path / 'a.csv'}:7: column 'review' is empty"
    data = classifier(predict=[SourceConfig(str(tmp_path / "a.csv"), columns=COLUMNS)])
    data.setup("predict")
    assert data.reports["predict"].examples == 5  # a class that is not known is no reason not to predict it

    tests = [
        {"question": "Six?", "answer": "6"},
        {"question": "Seven?", "answer": 7},
        {"question": None, "answer": "8"},
    ]
    path = write_jsonl(tmp_path / "b.jsonl", tests)
    asks = {"prompt": "question", "completion": "answer"}
    report = encoded(lambda **s: SFTDataModule(tokenizer, **s), path, columns=asks).reports["train"]
    assert (report.examples, report.dropped) == (1, {"wrong_type": 1, "empty_cell": 1})
    assert f"{path}:2: field 'completion' is 7" in report.details["wrong_type"]
    assert "completion: '{answer}'" in report.details["wrong_type"]


def test_table_with_the_names_of_fields_needs_no_columns(tmp_path, tokenizer):
    rows = [
        {"prompt": "Six?", "completion": "6"},
        {"prompt": "7?", "completion": ""},
        {"prompt": "8", "completion": "[8]"},
    ]
    path = write_csv(tmp_path / "a.csv", rows)
    data = encoded(lambda **s: SFTDataModule(tokenizer, **s), path)
    assert data.reports["train"].dropped == {"empty_cell": 1} and data.reports["train"].examples == 2
    data = SFTDataModule(tokenizer, predict=[SourceConfig(path)])
    data.setup("predict")
    assert data.examples["predict"]["reference"] == ["6", None, "[8]"]

    chat = [{"messages": json.dumps(record["messages"]), "id": "007"} for record in chats(1)]
    (found,) = records_of(write_csv(tmp_path / "b.csv", chat))
    assert found == {"messages": chats(1)[0]["messages"], "id": "007"}

    judged = [{"prompt": "a", "completion": "1", "label": "True"}, {"prompt": "a", "completion": "b", "label": "False"}]
    path = write_csv(tmp_path / "c.csv", judged)
    data = encoded(lambda **s: RewardDataModule(tokenizer, kind="outcomes", **s), path)
    assert data.examples["train"]["scores"] == [[1.0], [0.0]]


@pytest.mark.parametrize("stars", [[5, 1, 3], [5.0, 1.0, 3.0], ["5", "1", "3"]])
def test_number_is_the_class_of_that_name(stars, tmp_path, classifier, tokenizer):
    """Of labels `1` to `5` the number 5 is the last, and no index."""
    pyarrow.parquet.write_table(pyarrow.table({"review": ["a", "b", "c"], "stars": stars}), tmp_path / "a.parquet")
    data = encoded(classifier, tmp_path / "a.parquet", columns=COLUMNS)
    assert data.examples["train"]["target"] == [[4.0], [0.0], [2.0]]
    rows = [{"text": name, "label": number} for name, number in zip("abc", stars, strict=True)]
    data = encoded(classifier, write_csv(tmp_path / "b.csv", rows))
    assert data.examples["train"]["target"] == [[4.0], [0.0], [2.0]]


def test_number_is_an_index_where_names_are_words(tmp_path, tokenizer):
    path = write_csv(tmp_path / "a.csv", [{"text": "a", "label": 1}, {"text": "b", "label": "bad"}])
    data = encoded(lambda **s: ClassificationDataModule(tokenizer, labels=["bad", "good"], **s), path)
    assert data.examples["train"]["target"] == [[1.0], [0.0]]
    path = write_csv(tmp_path / "b.csv", [{"text": "a", "label": "1.50"}])
    scale = {"labels": ["quality"], "problem": "regression"}
    assert encoded(lambda **s: ClassificationDataModule(tokenizer, **scale, **s), path).examples["train"]["target"] == [
        [1.5]
    ]


def test_record_of_columns_is_no_record_to_other_readers():
    ((_, found),) = SourceConfig(records=[{"a": ""}], columns={"prompt": "a"}).read()
    assert found == UnusableRecord("empty_cell", "records[0]: column 'a' is empty", {"prompt"}, {})


@pytest.mark.parametrize("encoding, line", [("cp1252", 2), ("utf-16", 1)])
def test_table_in_another_encoding_names_its_line_and_how_to_convert_it(encoding, line, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text;label\nsch\u00f6n;1\n".encode(encoding))
    said = rf"a\.csv:{line}: not UTF-8 text\. .* iconv -f {encoding} -t utf-8 \S*/a\.csv > NEW\.csv"
    with pytest.raises(RecordError, match=said):
        list(SourceConfig(str(path)).read())
