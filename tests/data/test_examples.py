"""One pass from a record to its row in one file, whose name depends on everything that decides the row."""

import importlib
import sys
from pathlib import Path

import datasets
import pytest

from lit_alignment import ClassificationDataModule, RewardDataModule, SFTDataModule
from lit_alignment.data.examples import code_files, code_fingerprint
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import RecordError
from tests.helpers import ROOT, chats, pairs, write_jsonl

DATA = ROOT / "lit_alignment/data"


@pytest.fixture(autouse=True)
def _forget():
    code_fingerprint.cache_clear()
    yield
    code_fingerprint.cache_clear()


def files_of(kind):
    return code_files(each.__module__ for each in kind.__mro__ if each.__module__.startswith("lit_alignment"))


def test_a_source_is_one_file_in_the_cache(tokenizer, tmp_path):
    data = SFTDataModule(tokenizer, train=[SourceConfig(records=chats(9))], cache_dir=str(tmp_path))
    data.setup("fit")
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".arrow"
    assert list(datasets.Dataset.from_file(str(file))["id"]) == [record["id"] for record in chats(9)]


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("choice", [{}, {"num_rows": 3}, {"num_samples": 2}, {"sample_rate": 0.1}])
def test_records_that_are_not_chosen_are_validated_and_counted_too(tokenizer, num_proc, choice):
    twice = [*chats(300), {**chats(1)[0], "id": "r123"}]
    with pytest.raises(RecordError, match=r"records\[300\]: field 'id' 'r123' is also the id of records\[123\]"):
        SFTDataModule(tokenizer, train=[SourceConfig(records=twice, **choice)], num_proc=num_proc).setup("fit")
    wrong = [*chats(300), {"messages": [{"role": "judge", "content": "x"}]}]
    with pytest.raises(RecordError, match=r"records\[300\]: field 'messages\[0\].role' is 'judge'"):
        SFTDataModule(tokenizer, train=[SourceConfig(records=wrong, **choice)], num_proc=num_proc).setup("fit")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_dropped_rows_keep_their_reason(tokenizer, num_proc, tmp_path):
    question = {"id": "q", "messages": [{"role": "user", "content": "only"}]}
    sources = [SourceConfig(records=[*chats(100), question])]
    data = SFTDataModule(tokenizer, train=sources, num_proc=num_proc, cache_dir=str(tmp_path))
    data.setup("fit")
    (file,) = tmp_path.iterdir()
    stored = datasets.Dataset.from_file(str(file))[100]
    assert (stored["id"], stored["dropped"], stored["length"], stored["input_ids"]) == (
        "q", "no_trained_message", 0, []
    )  # fmt: skip
    assert data.reports["train"].dropped == {"no_trained_message": 1}


def test_data_set_of_the_hub_is_read_once(tokenizer, monkeypatch):
    asked = []
    found = datasets.Dataset.from_list(chats(6))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or found)
    source = SourceConfig("owner/name", subset="main", split="train[:6]", name="hub")
    for _ in range(2):
        data = SFTDataModule(tokenizer, train=[source])
        data.setup("fit")
        assert list(data.examples["train"]["id"]) == [f"r{index}" for index in range(6)]
    assert asked == [("owner/name", "main", "train[:6]")]


def test_changed_code_gives_another_fingerprint(monkeypatch):
    modules = tuple(kind.__module__ for kind in SFTDataModule.__mro__ if kind.__module__.startswith("lit_alignment"))
    before = code_fingerprint(modules)
    read_bytes = Path.read_bytes
    deciding = ["encoding/encoder.py", "encoding/templates.py", "sources/records.py", "sft.py", "conversation.py"]
    for name in deciding:
        code_fingerprint.cache_clear()
        changed = DATA / name
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda file, c=changed: read_bytes(file) + b"\n" * (file == c))
            assert code_fingerprint(modules) != before, name
    code_fingerprint.cache_clear()
    assert code_fingerprint(modules) == before


def test_code_of_a_method_is_its_own_and_what_that_imports():
    expected = {*(DATA / "encoding").glob("*.py"), DATA / "sources/records.py", DATA / "base.py"}
    for kind, own, others in (
        (SFTDataModule, {"sft.py"}, {"reward.py", "feedback.py", "rag.py"}),
        (RewardDataModule, {"reward.py", "feedback.py"}, {"sft.py"}),
        (ClassificationDataModule, {"classification.py"}, {"sft.py", "reward.py"}),
    ):
        found = files_of(kind)
        assert expected | {DATA / name for name in own} <= found
        assert not found & {DATA / name for name in others}
        assert not any(file.parent.name == "batching" for file in found)


def test_data_are_encoded_again_when_a_method_of_somebody_else_changes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    counted = tmp_path / "counted.txt"
    code = f"""
from lit_alignment import SFTDataModule
class OwnDataModule(SFTDataModule):
    def encode_record(self, record, source):
        open({str(counted)!r}, "a").write("x")
        return super().encode_record(record, source)
"""

    def load():
        counted.write_text("")
        code_fingerprint.cache_clear()
        importlib.invalidate_caches()
        sys.modules.pop("own_method", None)
        module = importlib.import_module("own_method")
        module.OwnDataModule(tokenizer, train=[SourceConfig(records=chats(3))]).setup("fit")
        return len(counted.read_text())

    file = tmp_path / "own_method.py"
    file.write_text(code)
    assert [load(), load()] == [3, 0]
    file.write_text(code + "# changed\n")
    assert load() == 3
    sys.modules.pop("own_method")


def test_cherry_picks_read_no_more_than_they_show(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(3), {"messages": 5}])
    data = SFTDataModule(tokenizer, predict=[SourceConfig(records=chats(1))])
    items = data.predict_items([SourceConfig(path, num_rows=3)])
    assert [(item.index, item.id) for item in items] == [(0, "r0"), (1, "r1"), (2, "r2")]
    assert not list(data.cache_dir.glob("*"))


def test_row_of_a_pair_holds_scores_of_which_the_higher_is_better(tokenizer):
    data = RewardDataModule(tokenizer, train=[SourceConfig(records=pairs(1))])
    data.setup("fit")
    row = data.examples["train"][0]
    assert row["scores"] == [1.0, 0.0] and len(row["responses"]) == 2
    answers = {
        "messages": [{"role": "user", "content": "q"}],
        "answers": [{"id": "a", "content": "x"}, {"id": "b", "content": "y"}],
        "rewards": {"a": 1.5, "b": 2.5},
    }
    data = RewardDataModule(tokenizer, train=[SourceConfig(records=[answers])])
    data.setup("fit")
    row = data.examples["train"][0]
    assert row["scores"] == [1.5, 2.5]
    assert [name for name, _ in data.views(row)] == ["response 0 (2)", "response 1 (1)"]  # ranks, for people
    (batch,) = data.train_dataloader()
    assert batch.targets.tolist() == [1.5, 2.5]
    data = RewardDataModule(tokenizer, predict=[SourceConfig(records=[answers])])
    (item,) = data.predict_items(data.sources["predict"])
    assert item.scores == [1.5, 2.5] and [answer["id"] for answer in item.answers] == ["a", "b"]
