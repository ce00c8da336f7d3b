"""Caching, drop reports, prompts and batches of the data module."""

import json
import os

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lit_alignment import SFTDataModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from tests.helpers import chats, sft_data, sft_module, trainer, write_jsonl


def module_of(tokenizer, *sources, **settings):
    return SFTDataModule(tokenizer, train=list(sources), **settings)


def test_data_are_encoded_once_and_again_only_when_something_changed(tokenizer, tmp_path, monkeypatch):
    calls = []
    encode = SFTDataModule.encode_record
    monkeypatch.setattr(SFTDataModule, "encode_record", lambda *a: (calls.append(1), encode(*a))[1])
    path = write_jsonl(tmp_path / "a.jsonl", chats(4))

    def load(**settings):
        calls.clear()
        data = module_of(tokenizer, SourceConfig(path), **settings)
        data.setup("fit")
        return len(calls)

    assert load() == 4
    assert load() == 0
    assert load(encoding=EncodingConfig(loss_on="all")) == 4
    assert load() == 0
    write_jsonl(tmp_path / "a.jsonl", chats(5))
    os.utime(path, (1, 1))
    assert load() == 5
    tokenizer.add_tokens(["kitchen"])
    assert load() == 5


def test_several_processes_encode_the_same(tokenizer):
    rows = []
    for number in (1, 2):
        data = module_of(tokenizer, SourceConfig(records=chats(20)), num_proc=number, cache_dir=None, seed=number)
        data.setup("fit")
        rows.append(data.examples["train"]["input_ids"][:])
    assert rows[0] == rows[1]


def test_drop_report_counts_reasons_and_is_written_beside_the_run(tmp_path):
    records = [
        *chats(3),
        {"id": "q", "messages": [{"role": "user", "content": "only a question"}]},
        {"id": "long", "messages": [{"role": "user", "content": "x " * 600}, {"role": "assistant", "content": "y"}]},
    ]
    module = sft_module()
    data = sft_data(module, records, encoding=EncodingConfig(max_length=300))
    runner = trainer(tmp_path, logger=True)
    runner.fit(module, data)
    report = data.reports["train"]
    assert report.dropped == {"no_trained_message": 1, "too_long": 1} and report.examples == 3
    assert "dropped: 1 no_trained_message; 1 too_long" in report.line() and "% of them trained" in report.line()
    stored = json.load(open(f"{runner.log_dir}/data_report.json"))
    assert stored["train"]["dropped"] == {"no_trained_message": 1, "too_long": 1}
    assert stored["train"]["trained_tokens"] == sum(data.examples["train"]["num_trained"])


def test_nothing_left_and_dropped_records_can_be_errors(tokenizer):
    question = {"messages": [{"role": "user", "content": "q"}]}
    with pytest.raises(
        ConfigError, match="data.train: no example .* nothing to train on. train: 0 examples from 1 records"
    ):
        module_of(tokenizer, SourceConfig(records=[question])).setup("fit")
    with pytest.raises(ConfigError, match=r"records were dropped. train: 2 examples .* 1 no_trained_message"):
        module_of(tokenizer, SourceConfig(records=[*chats(2), question]), on_drop="error").setup("fit")
    with pytest.raises(
        ConfigError, match="nothing to validate on. val: 0 examples from 1 records.*1 no_trained_message"
    ):
        sources = {"train": [SourceConfig(records=chats(2))], "val": [SourceConfig(records=[question])]}
        SFTDataModule(tokenizer, **sources).setup(TrainerFn.FITTING)  # as the Trainer calls it
    with pytest.raises(ConfigError, match="data.train is empty"):
        module_of(tokenizer).setup("fit")


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "empty.jsonl"}, r"source 'empty' \(.*empty.jsonl\) holds no records"),
        ({"path": "blank.jsonl"}, "holds no records"),
        ({"path": "list.json"}, "holds no records"),
        ({"records": []}, "source 'records' holds no records"),
        ({"path": "good.jsonl", "offset": 9}, r"good.jsonl\) chooses none of its 4 records by offset: 9"),
        ({"path": "good.jsonl", "num_rows": 0}, "by offset: 0, num_rows: 0"),
        ({"path": "good.jsonl", "num_samples": 0}, "by offset: 0, num_samples: 0"),
        ({"path": "good.jsonl", "sample_rate": 1e-9}, "by offset: 0, sample_rate: 1e-09"),
    ],
)
def test_source_that_gives_no_record_is_named_beside_others_too(tokenizer, tmp_path, split, source, words):
    for name, text in (("empty.jsonl", ""), ("blank.jsonl", "\n \n"), ("list.json", "[]")):
        (tmp_path / name).write_text(text)
    write_jsonl(tmp_path / "good.jsonl", chats(4))
    source = source | ({"path": str(tmp_path / source["path"])} if "path" in source else {})
    sources = {"train": [SourceConfig(records=chats(2), name="x")]}
    sources[split] = [SourceConfig(records=chats(2), name="x"), SourceConfig(**source)]
    stage = {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}[split]
    with pytest.raises(ConfigError, match=f"data.{split}: .*{words}"):
        SFTDataModule(tokenizer, **sources).setup(stage)


def test_duplicate_id_names_both_lines(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**record, "id": "same"} for record in chats(2)])
    with pytest.raises(RecordError, match=r"a.jsonl:2: field 'id' 'same' is also the id of .*a.jsonl:1"):
        module_of(tokenizer, SourceConfig(path)).setup("fit")


def test_sources_are_mixed_by_repeat_and_weight(tokenizer):
    data = module_of(
        tokenizer,
        SourceConfig(records=chats(10), name="a", weight=3.0),
        SourceConfig(records=chats(30, seed=1), name="b", weight=1.0),
        SourceConfig(records=chats(4, seed=2), name="c", repeat=2.0),
    )
    data.setup("fit")
    names = list(data.examples["train"]["dataset"])
    assert {name: names.count(name) for name in "abc"} == {"a": 30, "b": 10, "c": 8}


def test_batches_carry_the_weight_of_their_window(tmp_path):
    seen = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((len(batch.targets), batch.window_weight))

    module = sft_module()
    data = sft_data(module, chats(10), packing=False, batch_size=2)
    trainer(tmp_path, callbacks=[Keep()], accumulate_grad_batches=3).fit(module, data)
    for start in (0, 3):
        window = seen[start : start + 3]
        assert {weight for _, weight in window} == {sum(count for count, _ in window)}


def test_predict_batches_are_sorted_by_length(tokenizer):
    data = SFTDataModule(tokenizer, predict=[SourceConfig(records=chats(9))], batch_size=2)
    data.setup("predict")
    items = [item for batch in data.predict_dataloader() for item in batch.items]
    lengths = [len(item.input_ids) for item in items]
    assert lengths == sorted(lengths, reverse=True) and sorted(item.index for item in items) == list(range(9))


def test_system_prompt_of_a_source_reaches_its_prompts(tokenizer):
    data = SFTDataModule(tokenizer, predict=[SourceConfig(records=chats(1), system_prompt="be short")])
    data.setup("predict")
    item = next(iter(data.predict_dataloader())).items[0]
    assert item.messages[0] == {"role": "system", "content": "be short", "train": False}
    assert "be short" in tokenizer.decode(item.input_ids)


def test_limit_given_as_a_share_cuts_the_last_window_and_its_weight(tmp_path):
    """Of eight batches half are trained on, in windows of three and one."""
    seen = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((float(batch.weights.sum()), float(batch.window_weight)))

    module = sft_module()
    data = sft_data(module, chats(16), packing=False, batch_size=2)
    trainer(tmp_path, callbacks=[Keep()], accumulate_grad_batches=3, limit_train_batches=0.5).fit(module, data)
    own = [weight for weight, _ in seen]
    assert [window for _, window in seen] == pytest.approx([sum(own[:3])] * 3 + [own[3]])
