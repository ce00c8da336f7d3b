"""The card of an export: what was trained on what, with which figures, and no path of the machine."""

import json
from dataclasses import replace

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import Export, SFTModule, SourceConfig
from lit_alignment.checkpoints.card import model_card
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.paths import cache_dir
from lit_alignment.tools.export import main as export
from lit_alignment.training.run_summary import _name
from tests.helpers import (
    base_model_folder,
    chats,
    class_data,
    classifier,
    labelled,
    scoring_settings,
    sft_data,
    trainer,
)


@pytest.fixture
def hub_base():
    """A base that the cache has under its name on the hub, with the license in its card."""
    folder = cache_dir() / "models" / "someone--tiny"
    base_model_folder(folder)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Tiny\n")
    return "someone/tiny"


def front(folder):
    text = (folder / "README.md").read_text()
    _, values, rest = text.split("---\n", 2)
    return yaml.safe_load(values), rest


def test_folders_carry_data_settings_and_figures_and_the_base_by_its_name(hub_base, tmp_path):
    module = SFTModule(**scoring_settings(hub_base, True, {}))
    data = sft_data(module, chats(6), chats(3, seed=1))
    saver = ModelCheckpoint(tmp_path / "run", filename="trained", monitor="val/loss")
    runner = trainer(tmp_path, max_epochs=1, callbacks=[saver, Export()], enable_checkpointing=True)
    runner.fit(module, data)
    export([saver.best_model_path, "--out", str(tmp_path / "merged"), "--form", "merged"])
    for folder, form in ((tmp_path / "run/trained", "adapter"), (tmp_path / "merged", "finetune")):
        values, text = front(folder)
        assert values["base_model"] == hub_base and values["base_model_relation"] == form
        assert values["license"] == "mit" and values["pipeline_tag"] == "text-generation"
        assert values["library_name"] == ("peft" if form == "adapter" else "transformers")
        assert "supervised fine-tuning" in text and f"| train: train | {6} |" in text and "| val: val | 3 |" in text
        assert "| learning_rate | 0.01 |" in text
        assert f"| val/loss | {float(runner.callback_metrics['val/loss']):.4g} |" in text
        assert f"lit-alignment chat {folder.name}" in text
        for path in (tmp_path, cache_dir()):
            assert str(path) not in (folder / "README.md").read_text()
    described = json.loads((tmp_path / "run/trained/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == hub_base
    assert isinstance(SFTModule.from_checkpoint(tmp_path / "run/trained", device="cpu").chat("the scale"), str)


def test_base_of_this_machine_is_named_without_its_path(tmp_path):
    module = classifier(base_model_folder(tmp_path / "base"))
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, class_data(module, labelled(3)))
    runner.save_checkpoint(tmp_path / "trained.ckpt")
    export([str(tmp_path / "trained.ckpt"), "--out", str(tmp_path / "out")])
    values, text = front(tmp_path / "out")
    assert not values.keys() & {"base_model", "license", "datasets"}
    assert values["pipeline_tag"] == "text-classification"
    assert "`base`, trained by classification" in text and str(tmp_path) not in text
    assert 'ClassificationModule.from_checkpoint("out").classify' in text


def test_values_of_a_checkpoint_open_no_markup(tmp_path):
    module = SFTModule(**scoring_settings(base_model_folder(tmp_path / "base"), False, {}))
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, sft_data(module, chats(2)))
    runner.save_checkpoint(tmp_path / "trained.ckpt")
    saved = read_saved(tmp_path / "trained.ckpt")
    assert saved.run["step"] == 1 and model_card(saved, "full", "out").count("# out") == 1
    hostile = {"method": "x\n# y", "data": {"train": [{"name": "a | b\n<script>"}]}, "figures": {"val/loss": "<b>"}}
    card = model_card(replace(saved, run=hostile), "full", "out")
    assert "<script>" not in card and "\n# y" not in card and "<b>" not in card
    assert all(line.count("|") in (0, 3) for line in card.splitlines())


def test_data_sets_of_the_hub_keep_their_names_and_files_lose_their_folders(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert _name(SourceConfig("someone/chats")) == "someone/chats"
    assert _name(SourceConfig(str(tmp_path / "mine.jsonl"))) == "mine"
    assert _name(SourceConfig("mine/gone.jsonl")) == "gone"
    assert _name(SourceConfig(records=[{}], name="own")) == "own"
