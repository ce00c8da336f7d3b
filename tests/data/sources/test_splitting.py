from collections import Counter

import numpy as np
import pytest

from lit_alignment import ClassificationDataModule, PreferenceDataModule, SFTDataModule
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.data.sources.splitting import held_out
from lit_alignment.errors import ConfigError
from tests.helpers import chats, write_jsonl


def ids(data, split):
    rows = data.examples[split]
    return list(zip(rows["dataset"], rows["id"], strict=True))


def loaded(data, stage="fit"):
    data.setup(stage)
    return data


@pytest.fixture
def two_files(tmp_path):
    return [write_jsonl(tmp_path / f"{name}.jsonl", chats(size, seed=size)) for name, size in (("a", 40), ("b", 15))]


def test_each_class_gives_its_part_and_a_single_record_stays():
    """Of 1000, 100, 10, 4 and 1 records a tenth: the total is exact, each class to one record."""
    sizes = [1000, 100, 10, 4, 1]
    classes = np.repeat(np.arange(5.0), sizes)
    held = held_out(classes, 0.1, np.random.default_rng(0))
    counts = [held[classes == kind].sum() for kind in range(5)]
    assert counts[:3] == [100, 10, 1] and counts[3] in (0, 1) and counts[4] == 0
    assert held.sum() == round(0.1 * 1114)
    assert not np.array_equal(held, held_out(classes, 0.1, np.random.default_rng(1)))


def test_records_train_or_validate_and_never_both(two_files, tokenizer):
    sources = [SourceConfig(two_files[0], repeat=3.0), SourceConfig(two_files[1])]
    data = loaded(SFTDataModule(tokenizer, train=sources, val_fraction=0.2))
    train, val = ids(data, "train"), ids(data, "val")
    assert not set(train) & set(val) and len(set(train) | set(val)) == 55
    assert Counter(Counter(val).values()) == {1: 11}  # once, whatever the repeats
    assert {name: sum(source == name for source, _ in val) for name in "ab"} == {"a": 8, "b": 3}
    assert Counter(name for name, _ in train) == {"a": 3 * 32, "b": 12}
    assert data.reports["val"].sources == {"a": 8, "b": 3} and data.reports["train"].sources == {"a": 32, "b": 12}
    weighted = [SourceConfig(two_files[0], weight=1.0), SourceConfig(two_files[1], weight=1.0)]
    mixed = loaded(SFTDataModule(tokenizer, train=weighted, val_fraction=0.2))
    assert ids(mixed, "val") == val and Counter(name for name, _ in ids(mixed, "train")) == {"a": 22, "b": 22}


def test_draw_depends_on_source_and_seed_alone(two_files, tokenizer):
    sources = [SourceConfig(path) for path in two_files]
    settings = {"val_fraction": 0.2, "packing": False}
    val = ids(loaded(SFTDataModule(tokenizer, train=sources, **settings)), "val")
    alone = loaded(SFTDataModule(tokenizer, train=sources[1:], **settings))
    assert ids(alone, "val") == [each for each in val if each[0] == "b"]
    again = loaded(SFTDataModule(tokenizer, train=sources[::-1], **settings), "validate")  # as `validate` sees them
    assert sorted(ids(again, "val")) == sorted(val)
    assert ids(loaded(SFTDataModule(tokenizer, train=sources, seed=1, **settings)), "val") != val


def test_parts_of_one_conversation_stay_together(tokenizer, tmp_path):
    """Reasoning that later prompts do not show makes several examples of a record."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}"
    template += "({{ m.reasoning_content }}){% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = template
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = [{"role": role, "content": text, "reasoning_content": "hm"} for role, text in turns]
    source = SourceConfig(records=[{"id": f"r{i}", "messages": chat} for i in range(12)])
    data = loaded(SFTDataModule(tokenizer, train=[source], val_fraction=0.5))
    found = {split: [own.partition("#")[0] for _, own in ids(data, split)] for split in ("train", "val")}
    assert set(Counter(found["val"]).values()) == set(Counter(found["train"]).values()) == {2}
    assert len(set(found["val"])) == 6 and not set(found["val"]) & set(found["train"])
    assert {item.id for item in data.validation_items()} == set(found["val"])


def test_classes_are_in_both_as_in_all(tokenizer):
    labels = ["rare"] * 10 + ["often"] * 90
    records = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    data = ClassificationDataModule(
        tokenizer, labels=["rare", "often"], train=[SourceConfig(records=records)], val_fraction=0.2
    )
    loaded(data)
    for split, expected in (("train", {0.0: 8, 1.0: 72}), ("val", {0.0: 2, 1.0: 18})):
        assert Counter(target for (target,) in data.examples[split]["target"]) == expected


def test_plain_chats_beside_pairs_train_alone(tokenizer):
    pairs = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    sources = {
        "train": [SourceConfig(records=pairs, name="pairs")],
        "chats": [SourceConfig(records=chats(20), name="c")],
    }
    data = loaded(PreferenceDataModule(tokenizer, val_fraction=0.25, **sources))
    assert Counter(name for name, _ in ids(data, "val")) == {"pairs": 5}
    assert Counter(name for name, _ in ids(data, "train")) == {"pairs": 15, "c": 20}


def test_fraction_that_cannot_be_held_out_is_refused(two_files, tokenizer):
    a, b = map(SourceConfig, two_files)
    for settings, words in (
        ({"train": [a], "val_fraction": 0.7}, "val_fraction is 0.7; use a number from 0 to 0.5"),
        ({"train": [a], "val": [b], "val_fraction": 0.1}, "Give one of them"),
        ({"train": [a, SourceConfig(two_files[0], name="c")], "val_fraction": 0.1}, "a.jsonl twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            SFTDataModule(tokenizer, **settings)
