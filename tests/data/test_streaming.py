import json

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import LossConfig
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import CheckpointError, ConfigError, RecordError
from tests.helpers import (
    Killed,
    Seen,
    assert_same_gradients,
    chats,
    class_data,
    classifier,
    judged,
    pairs,
    preference_data,
    preference_module,
    sft_data,
    sft_module,
    step_gradients,
    trainer,
    write_jsonl,
)

STREAMED = {"streaming": True, "shuffle_buffer": 8, "tokens_per_batch": 600}
ENDLESS = {"max_epochs": -1}


def built(method, records, **settings):
    if method == "sft":
        module = sft_module()
        return module, sft_data(module, records, **settings)
    losses = [LossConfig("kto_pair" if method == "kto_pair" else "sigmoid")]
    module = preference_module(lora=True, losses=losses)
    return module, preference_data(module, records, **settings)


def fit(folder, records, steps=6, method="sft", ckpt_path=None, accumulate=2, die_at=None, save=False, **settings):
    module, data = built(method, records, **STREAMED | settings)
    seen = Seen(die_at)
    saver = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if save else []
    options = {"callbacks": [seen, *saver], "accumulate_grad_batches": accumulate, "enable_checkpointing": save}
    runner = trainer(folder, max_steps=steps, **ENDLESS, **options)
    try:
        runner.fit(module, data, ckpt_path=ckpt_path)
    except Killed:
        pass
    return seen, data


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", ["sft", "preferences", "kto_pair"])
def test_streamed_accumulation_equals_one_big_batch(method, packing, tmp_path):
    """The weight of a step is counted as it is read: its loss is the mean over just what it trains on."""
    records = {each["id"]: each for each in (chats(40) if method == "sft" else pairs(40))}
    module, data = built(method, list(records.values()), **STREAMED, packing=packing, batch_size=2)
    seen = Seen()
    options = {"accumulate_grad_batches": 3, "callbacks": [seen]}
    parts = step_gradients(tmp_path, module, data, **ENDLESS, **options)
    names = [name.partition("/")[2] for batch in seen.ids for name in batch]
    assert len(seen.ids) == 3 and len(names) == len(set(names)) > 3
    whole = step_gradients(tmp_path, *built(method, [records[n] for n in names], packing=False, batch_size=99))
    assert_same_gradients(parts, whole)


def test_rows_are_packed_as_they_come_and_hold_each_record_once_in_a_pass(tmp_path):
    records = chats(40)
    seen, data = fit(tmp_path, records, steps=20)
    assert any(len(batch) > 1 for batch in seen.ids)
    names = [name for batch in seen.ids for name in batch]
    passes = [sorted(names[start : start + 40]) for start in range(0, len(names) - 40, 40)]
    assert len(passes) > 2 and all(each == sorted(f"train/r{i}" for i in range(40)) for each in passes)
    assert names[:40] != names[40:80] and data.reports["train"].examples >= len(names)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_sees_the_same_records_and_losses(workers, tmp_path):
    """Killed in the middle of an optimizer step, and resumed twice; workers change nothing."""
    records = chats(30)
    whole, _ = fit(tmp_path / "whole", records)
    first, _ = fit(tmp_path, records, die_at=5, save=True, num_workers=workers)
    assert first.ids == whole.ids[:5]
    second, _ = fit(tmp_path, records, steps=4, ckpt_path=tmp_path / "step=2.ckpt", save=True, num_workers=workers)
    third, _ = fit(tmp_path, records, ckpt_path=tmp_path / "step=4.ckpt", num_workers=workers)
    assert first.ids[:4] + second.ids + third.ids == whole.ids
    assert first.losses[:4] + second.losses + third.losses == pytest.approx(whole.losses, rel=1e-6)


def test_another_accumulation_takes_the_records_that_follow(tmp_path):
    records = chats(30)
    whole, _ = fit(tmp_path / "whole", records)
    first, _ = fit(tmp_path, records, steps=2, save=True)
    rest, _ = fit(tmp_path, records, steps=4, accumulate=3, ckpt_path=tmp_path / "step=2.ckpt")
    assert len(rest.ids) == 6 and first.ids + rest.ids == whole.ids[:10]


def test_other_data_or_another_way_to_read_them_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", chats(30))
    sources = {"train": [SourceConfig(path)], "encoding": EncodingConfig(max_length=512)}

    def run(**settings):
        module = sft_module()
        data = sft_data(module, []).__class__(module.tokenizer, **sources, **STREAMED | settings)
        saver = ModelCheckpoint(tmp_path, filename="saved", enable_version_counter=False, every_n_train_steps=1)
        options = {"callbacks": [saver], "enable_checkpointing": True} | ENDLESS
        given = tmp_path / "saved.ckpt"
        trainer(tmp_path, max_steps=2, **options).fit(module, data, ckpt_path=given if given.exists() else None)

    run()
    for settings, words in (
        ({"seed": 1}, "in another order: seed 0, now 1"),
        ({"shuffle_buffer": 9}, "shuffle_buffer 8, now 9"),
        ({"packing": False}, "tokens_per_batch 600, now 0"),
        ({"streaming": False}, "trained with data.streaming: true. Resume with that"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(**settings)
    write_jsonl(tmp_path / "a.jsonl", chats(31))
    with pytest.raises(CheckpointError, match="on other data, or in another order: fingerprint"):
        run()


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_records_that_are_no_examples_are_counted_and_named(workers, tmp_path):
    short = {"max_length": 60, "truncation": "drop"}
    settings = {"encoding": EncodingConfig(**short), "tokens_per_batch": 60, "num_workers": workers}
    _, data = fit(tmp_path, chats(30), **settings)
    report = data.reports["train"]
    assert report.dropped["too_long"] > 0
    assert report.examples + report.dropped["too_long"] == report.sources["train"]
    with pytest.raises(ConfigError, match="data.on_drop is 'error' and a record was dropped"):
        fit(tmp_path, chats(30), on_drop="error", **settings)
    with pytest.raises(ConfigError, match="no example is left, so there is nothing to train on"):
        fit(tmp_path, [each for each in chats(30) if len(json.dumps(each)) > 600], **settings)
    with pytest.raises(RecordError, match=r"train\[3\]: field 'messages' is missing"):
        fit(tmp_path, [*chats(3), {"text": "no"}], num_workers=workers)


def test_what_an_endless_epoch_cannot_do_is_said(tmp_path):
    for options, words in (
        ({"max_steps": -1, "max_epochs": 1}, "has no end: set trainer.max_steps"),
        ({"max_steps": 5, "max_epochs": 2}, "leave trainer.max_epochs"),
        ({"max_steps": 5, "limit_train_batches": 3, **ENDLESS}, "leave trainer.limit_train_batches"),
        ({"max_steps": 5, **ENDLESS}, "set trainer.val_check_interval to a number of batches"),
    ):
        module = sft_module()
        with pytest.raises(ConfigError, match=words):
            trainer(tmp_path, **options).fit(module, sft_data(module, chats(5), chats(2, seed=1), **STREAMED))
    module = sft_module()
    trainer(tmp_path, fast_dev_run=True).fit(module, sft_data(module, chats(5), chats(2, seed=1), **STREAMED))
    module = sft_module()
    runner = trainer(tmp_path, max_steps=4, val_check_interval=2, **ENDLESS)
    runner.fit(module, sft_data(module, chats(5), chats(2, seed=1), **STREAMED))
    assert runner.global_step == 4 and "val/loss" in runner.callback_metrics


def test_what_looks_at_all_records_is_refused(tmp_path):
    module = classifier()
    with pytest.raises(ConfigError, match="ClassificationDataModule has to know all its examples"):
        class_data(module, [{"text": "a", "label": "bad"}], streaming=True)
    with pytest.raises(ConfigError, match="val_fraction is drawn from all records"):
        sft_data(sft_module(), chats(5), streaming=True, val_fraction=0.1)
    module = preference_module(lora=True)
    with pytest.raises(ConfigError, match="data.chats are mixed with pairs by the number of both"):
        preference_data(module, pairs(5), streaming=True, chats=[SourceConfig(records=chats(2))])
    for kind, records, settings, words in (
        ("preferences", pairs(5), {"reference": "cached"}, "model.reference: cached is computed of all records"),
        ("outcomes", judged(5), {"losses": [LossConfig("kto")]}, "kto needs responses of all ranks"),
    ):
        module = preference_module(lora=True, **settings)
        with pytest.raises(ConfigError, match=words):
            data = preference_data(module, records, kind=kind, **STREAMED)
            trainer(tmp_path, max_steps=1, **ENDLESS).fit(module, data)
