"""Data sets of the hub, on small copies in the layout and with the columns in which they are published."""

import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_alignment import PreferenceDataModule, SFTDataModule
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from tests.helpers import ROOT, sft_module, trainer, write_jsonl

ASK = "What is a shard?"


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def turn(role, content):
    return {"role": role, "content": content}


def ultrafeedback(folder):
    """HuggingFaceH4/ultrafeedback_binarized: six splits of one configuration, listed in its card."""

    def row(number):
        prompt = f"{ASK} {number}"
        answers = {
            name: [turn("user", prompt), turn("assistant", f"{name} {number}")] for name in ("chosen", "rejected")
        }
        scores = {"score_chosen": 8.5, "score_rejected": 5.0}
        return {"prompt": prompt, "prompt_id": f"{number:064x}", **answers, "messages": answers["chosen"], **scores}

    card = ["---", "license: mit", "configs:", "- config_name: default", "  data_files:"]
    for split, size in {"train_prefs": 3, "train_sft": 4, "test_prefs": 1, "test_sft": 1}.items():
        card += [f"  - split: {split}", f"    path: data/{split}-*"]
        write_parquet(folder / f"data/{split}-00000-of-00001.parquet", [row(number) for number in range(size)])
    (folder / "README.md").write_text("\n".join([*card, "---", "# UltraFeedback"]))


def hh(folder):
    """Anthropic/hh-rlhf: a folder for each part, compressed lines of whole dialogues."""
    begin = f"\n\nHuman: {ASK}\n\nAssistant: Of what?\n\nHuman: Of\n\na data set.\n\nAssistant:"
    rows = [
        {"chosen": f"{begin} A part.", "rejected": f"{begin} Glass."},
        {"chosen": f"{begin} A part.", "rejected": f"{begin}"},
        {"chosen": f"{begin} A part.", "rejected": "\n\nHuman: Else?\n\nAssistant: Glass."},
    ]
    for part, size in (("harmless-base", 3), ("helpful-base", 1)):
        (folder / part).mkdir(parents=True)
        for split in ("train", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows[:size])
            with pyarrow.CompressedOutputStream(str(folder / part / f"{split}.jsonl.gz"), "gzip") as file:
                file.write(lines.encode())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# HH")


def alpaca(folder):
    """tatsu-lab/alpaca: one split, with the whole text in a further column."""
    rows = [
        {"instruction": ASK, "input": "", "output": "A part.", "text": "Below is an instruction ..."},
        {"instruction": "Translate.", "input": "Scherbe", "output": "shard", "text": "Below is ..."},
        {"instruction": "Say nothing.", "input": "", "output": "", "text": "Below is ..."},
    ]
    write_parquet(folder / "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", rows)
    info = ["dataset_info:", "  splits:", "  - name: train", "    num_bytes: 156", "    num_examples: 3"]
    (folder / "README.md").write_text("\n".join(["---", "license: cc-by-nc-4.0", *info, "---"]))


def sharegpt(folder):
    """anon8231489123/ShareGPT_Vicuna_unfiltered: one list of conversations, some of them empty."""
    folder.mkdir(parents=True)
    rows = [
        {"id": "a_0", "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": "A part."}]},
        {"id": "b_0", "conversations": []},
        {"id": "c_0", "conversations": [{"from": "human", "value": ASK}, {"from": "bing", "value": "A part."}]},
    ]
    (folder / "ShareGPT_V3_unfiltered_cleaned_split.json").write_text(json.dumps(rows))


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder from which names of the hub are paths."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(module, tokenizer, **source):
    data = module(tokenizer, train=[SourceConfig(**source)])
    data.setup("fit")
    return data


def texts(data, tokenizer):
    return [tokenizer.decode(example.input_ids) for row in data.examples["train"] for _, example in data.views(row)]


def test_ultrafeedback_gives_pairs_and_conversations(in_folder, tokenizer):
    ultrafeedback(in_folder / "HuggingFaceH4/ultrafeedback_binarized")
    source = {"path": "HuggingFaceH4/ultrafeedback_binarized", "columns": "ultrafeedback"}
    data = loaded(PreferenceDataModule, tokenizer, **source, split="train_prefs")
    assert data.examples["train"]["scores"] == [[1.0, 0.0]] * 3
    chosen, rejected = texts(data, tokenizer)[:2]
    assert chosen.count(ASK) == 1 and "chosen 0" in chosen and "rejected 0" in rejected
    data = loaded(SFTDataModule, tokenizer, **source, split="train_sft")
    assert ["chosen" in text and text.count(ASK) == 1 for text in texts(data, tokenizer)] == [True] * 4


def test_hh_gives_pairs_that_differ_in_the_last_answer(in_folder, tokenizer):
    hh(in_folder / "Anthropic/hh-rlhf")
    source = {"path": "Anthropic/hh-rlhf", "subset": "harmless-base", "columns": "hh"}
    data = loaded(PreferenceDataModule, tokenizer, **source)
    assert data.reports["train"].dropped == {"empty_cell": 1, "wrong_type": 1}
    assert "train.jsonl.gz:3" in data.reports["train"].details["wrong_type"]
    chosen, rejected = texts(data, tokenizer)
    turns = [f"user\n{ASK}<|im_end|>", "assistant\nOf what?<|im_end|>", "user\nOf\n\na data set.<|im_end|>"]
    dialogue = "\n<|im_start|>".join(turns)
    assert dialogue in chosen and dialogue in rejected
    assert chosen.endswith("assistant\nA part.<|im_end|>\n") and rejected.endswith("assistant\nGlass.<|im_end|>\n")
    assert (
        len(loaded(SFTDataModule, tokenizer, **source | {"subset": "helpful-base"}, split="test").examples["train"])
        == 1
    )


def test_alpaca_joins_instruction_and_input(in_folder, tokenizer):
    alpaca(in_folder / "tatsu-lab/alpaca")
    data = loaded(SFTDataModule, tokenizer, path="tatsu-lab/alpaca", columns="alpaca")
    assert data.reports["train"].dropped == {"empty_cell": 1}
    assert "Translate.\n\nScherbe<|im_end|>" in texts(data, tokenizer)[1]


def test_alpaca_needs_no_input():
    record = {"instruction": ASK, "output": "A part."}
    assert [raw for _, raw in SourceConfig(records=[record], columns="alpaca").read()] == [record]


def test_sharegpt_knows_its_assistants(in_folder, tokenizer):
    sharegpt(in_folder / "ShareGPT_Vicuna_unfiltered")
    data = loaded(SFTDataModule, tokenizer, path="ShareGPT_Vicuna_unfiltered", columns="sharegpt")
    assert data.reports["train"].dropped == {"empty_cell": 1} and len(data.examples["train"]) == 2


def test_configurations_and_splits_are_those_of_the_card(in_folder):
    card = ["---", "configs:"]
    for name in ("main", "socratic"):
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "test"):
            card += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
            (in_folder / f"openai/gsm8k/{name}").mkdir(parents=True, exist_ok=True)
            write_jsonl(in_folder / f"openai/gsm8k/{name}/{split}.jsonl", [{"is": f"{name} {split}"}])
    (in_folder / "openai/gsm8k/README.md").write_text("\n".join([*card, "---"]))
    read = lambda **settings: [raw["is"] for _, raw in SourceConfig("openai/gsm8k", **settings).read()]  # noqa: E731
    assert read(subset="socratic", split="test") == ["socratic test"]
    assert read(subset="main") == ["main train"]
    for settings, words in (
        ({}, "['main', 'socratic']"),
        ({"subset": "mian"}, "['main', 'socratic']"),
        ({"subset": "main", "split": "val"}, "no split is named 'val' (there are: train, test)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            read(**settings)


def test_split_of_a_folder_is_its_file_of_that_name(in_folder):
    (in_folder / "mine").mkdir()
    for split in ("train", "test"):
        write_jsonl(in_folder / f"mine/{split}.jsonl", [{"is": split}])
    assert [raw["is"] for _, raw in SourceConfig("mine", split="test").read()] == ["test"]
    assert [raw["is"] for _, raw in SourceConfig("mine").read()] == ["test", "train"]  # all that is there


def test_stream_of_the_hub_is_trained_and_kept_nowhere(in_folder, monkeypatch):
    alpaca(in_folder / "kept")
    load, asked = datasets.load_dataset, []

    def give(path, *arguments, **settings):
        asked.append(settings["streaming"])
        return load(str(in_folder / "kept"), *arguments, **settings)

    monkeypatch.setattr(datasets, "load_dataset", give)
    monkeypatch.chdir(ROOT)
    module = sft_module()
    source = SourceConfig("tatsu-lab/alpaca", columns="alpaca")
    data = SFTDataModule(module.tokenizer, train=[source], streaming=True, cache_dir=str(in_folder / "cache"))
    trainer(in_folder, max_epochs=-1, max_steps=3).fit(module, data)
    assert set(asked) == {True} and not (in_folder / "cache").exists()
    report = data.reports["train"]
    assert report.sources["alpaca"] == report.examples + report.dropped["empty_cell"] >= 9


def test_name_of_the_hub_is_read_with_its_columns(in_folder, monkeypatch):
    """As the library gives a data set that it has kept."""
    alpaca(in_folder / "kept")
    load = datasets.load_dataset

    def give(path, *arguments, **settings):
        assert path == "tatsu-lab/alpaca"
        return load(str(in_folder / "kept"), *arguments, **settings)

    monkeypatch.setattr(datasets, "load_dataset", give)
    for streaming in (False, True):
        found = list(SourceConfig("tatsu-lab/alpaca", columns="alpaca").read(streaming))
        expected = {"instruction": "Translate.", "input": "Scherbe", "output": "shard"}
        assert found[1] == ("tatsu-lab/alpaca[1]", expected)
        assert found[2][1].detail == "tatsu-lab/alpaca[2]: column 'output' is empty"
    for settings, words in (
        ({"split": "test"}, 'Unknown split "test". Should be one of ['),
        ({"subset": "other"}, "BuilderConfig 'other' not found. Available: ['default']"),
        ({"columns": {"prompt": "question"}}, "no column is named 'question'"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            list(SourceConfig("tatsu-lab/alpaca", **settings).read())
