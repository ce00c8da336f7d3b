"""Options that change one item of a list by the name of its class."""

import json

import pytest
import yaml

from lit_alignment.config_items import split_items, with_items
from lit_alignment.errors import ConfigError
from tests.helpers.commands import command

LIST = [
    "lit_alignment.Export",
    {"class_path": "lit_alignment.CherryPicks", "init_args": {"num_samples": 3, "generation": {"top_k": 5}}},
]


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": LIST, "logger": {"class_path": "x.CSVLogger"}}}))
    return str(file)


def made(config, *options):
    rest, asked = split_items(["fit", "--config", config, *options])
    *_, last = with_items(rest, asked)
    name, _, value = last.partition("=")
    return name, json.loads(value)


def test_a_setting_of_one_callback_leaves_all_others(config):
    name, items = made(config, "--trainer.callbacks.CherryPicks.generation.top_p", "0.5")
    assert name == "--trainer.callbacks"
    generation = {"top_k": 5, "top_p": 0.5}
    assert items == [
        {"class_path": "lit_alignment.Export"},
        {"class_path": "lit_alignment.CherryPicks", "init_args": {"num_samples": 3, "generation": generation}},
    ]


def test_later_options_win_and_a_list_in_an_option_replaces_that_of_the_file(config):
    twice = ("--trainer.callbacks.CherryPicks.num_samples=8", "--trainer.callbacks.CherryPicks.num_samples=9")
    assert made(config, *twice)[1][1]["init_args"]["num_samples"] == 9
    other = "--trainer.callbacks=[{class_path: a.Throughput}]"
    assert made(config, other, "--trainer.callbacks.Throughput.every_n_steps=2")[1] == [
        {"class_path": "a.Throughput", "init_args": {"every_n_steps": 2}}
    ]
    added = "--trainer.callbacks+={class_path: a.Throughput}"
    assert len(made(config, added, "--trainer.callbacks.Throughput.every_n_steps=2")[1]) == 3


def test_a_single_logger_is_a_list_of_one(config):
    name, items = made(config, "--trainer.logger.CSVLogger.name", "other")
    assert name == "--trainer.logger"
    assert items == [{"class_path": "x.CSVLogger", "init_args": {"name": "other"}}]


@pytest.mark.parametrize(
    "option, message",
    [
        (
            "--trainer.callbacks.CherryPick.num_samples=8",
            "has Export, CherryPicks, no CherryPick. Did you mean CherryP",
        ),
        ("--trainer.callbacks.Zzz.n=8", r"no Zzz. Add it first: --trainer.callbacks\+=CLASS_PATH"),
        ("--trainer.plugins.Zzz.n=8", "trainer.plugins is empty, no Zzz"),
        ("--trainer.callbacks.CherryPicks.num_samples", "num_samples needs a value"),
    ],
)
def test_what_is_not_there_is_named(config, option, message):
    with pytest.raises(ConfigError, match=message):
        made(config, option)


def test_two_of_a_class_are_not_told_apart(config):
    with pytest.raises(ConfigError, match="has 2 items of CherryPicks"):
        made(config, "--trainer.callbacks+=lit_alignment.CherryPicks", "--trainer.callbacks.CherryPicks.num_samples=8")


def test_the_whole_configuration_has_it():
    options = ("--trainer.callbacks.CherryPicks.num_samples=7", "--print_config")
    run = command("fit", "--config", "configs/sft/tiny.yaml", *options)
    callbacks = yaml.safe_load(run.stdout)["trainer"]["callbacks"]
    assert len(callbacks) == 4 and callbacks[1]["init_args"]["num_samples"] == 7
    wrong = command("fit", "--config", "configs/sft/tiny.yaml", "--trainer.callbacks.CherryPicks.num_sample=7")
    assert "unknown key 'num_sample' in lit_alignment.CherryPicks. Did you mean 'num_samples'?" in wrong.stderr
