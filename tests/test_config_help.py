"""What `--help` says of settings: those of the method first."""

import pytest
from lightning.pytorch.strategies import Strategy

from lit_alignment.config_help import public_classes, settings_of, type_name
from lit_alignment.models.loading import BackboneConfig
from tests.helpers.commands import command


def all_settings(settings):
    for each in settings:
        yield each
        yield from all_settings(each.inner)


@pytest.mark.parametrize("name", public_classes())
def test_every_setting_of_a_public_class_says_what_it_does(name):
    kind = public_classes()[name]
    if not issubclass(kind, Strategy):  # Lightning's own settings of these have no text
        ours = [each for each in all_settings(settings_of(kind)) if not each.text]
        assert not ours, [each.key for each in ours]


def test_types_in_words():
    assert type_name(int | None) == "int or null"
    assert type_name(list[BackboneConfig] | None) == "list of BackboneConfig or null"
    assert type_name(dict[str, float]) == "float by name"
    assert type_name(tuple[float, float]) == "list of 2 float"


def test_defaults_are_those_of_the_signature():
    found = {each.key: each for each in settings_of(BackboneConfig)}
    assert found["path"].default is None and found["revision"].default == "main"
    assert found["compile"].default == "false" and found["tokenizer"].default == "null"


def test_help_of_a_command_shows_the_methods_and_that_of_a_file_its_settings():
    shown = command("fit", "--help").stdout
    assert shown.startswith("usage: lit-alignment fit --config FILE")
    assert "lit_alignment.PolicyModule" in shown and "newest" in shown and "--trainer.max_epochs" not in shown
    own = command("fit", "--config", "configs/reward/tiny.yaml", "--help").stdout
    assert "model: RewardModule" in own and "--model.backbone.path  str  (required)" in own
    assert "--data.train[].path" in own and "--engine" not in own
    assert "--vllm.NAME" in command("predict", "--help").stdout


def test_help_of_a_class_and_of_the_trainer():
    assert "  r  int  (default: 8)" in command("fit", "--help", "LoraConfig").stdout
    assert "--trainer.max_epochs" in command("fit", "--help", "trainer").stdout
    assert "no such class. Did you mean 'LoraConfig'?" in command("fit", "--help", "LoraConfg").stderr
