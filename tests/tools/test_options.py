"""Options of the tools: full names, numbers within bounds, one message."""

import argparse

import pytest

from lit_alignment.errors import ConfigError
from lit_alignment.tools.options import OptionParser, positive, whole
from tests.helpers.commands import command

CASES = {
    "inspect --config configs/sft/tiny.yaml --numb 1": "unrecognized arguments: --numb. Did you mean '--number'?",
    "inspect --config configs/sft/tiny.yaml --nmber=1": "Did you mean '--number'?",
    "inspect --config configs/sft/tiny.yaml --number 0": "argument --number: is '0'; use a whole number, 1 or more",
    "inspect --split trian": "argument --split: invalid choice: 'trian' (choose from",
    "inspect": "no configuration: give --config FILE",
    "export": "the following arguments are required: source, --out. `lit-alignment export --help` lists the options.",
    "export x --out y --dtyp z": "unrecognized arguments: --dtyp z. Did you mean '--dtype'?",
    "estimate --config configs/sft/tiny.yaml --link 0": "argument --link: is '0'; use a number above 0",
    "estimate --config configs/sft/tiny.yaml --utilization 2": "use a number above 0, at most 1",
    "evaluate a --ngram x": "argument --ngram: is 'x'; use a whole number, 1 or more",
    "fetch nothing": "invalid choice: 'nothing'",
    "sample a --strategy best": "argument --strategy: invalid choice",
    "index eval --quer x": "Did you mean '--queries'?",
    "merge a b --out c": "unrecognized arguments: b.",
    "convert a --overwrit": "Did you mean '--overwrite'?",
}


@pytest.mark.parametrize("words", CASES)
def test_wrong_option_is_one_message_with_exit_code_2(words):
    result = command(*words.split())
    (message,) = result.stderr.splitlines()
    assert result.returncode == 2 and CASES[words] in message, message


def test_settings_of_the_configuration_pass():
    parser = OptionParser("x")
    parser.add_argument("--number")
    settings = ["--config", "a", "--trainer.number", "1", "--model", "b", "--ckpt_path=c"]
    assert parser.split([*settings, "--number=2"]) == (argparse.Namespace(number="2"), settings)
    with pytest.raises(ConfigError, match="Did you mean '--number'"):
        parser.split(["--numbers", "1"])


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "x", "", "1e400"])
def test_number_that_is_no_positive_one_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        positive()(text)


def test_numbers_are_read():
    assert (positive(1)("0.5"), whole(0)("0"), whole(-3)("-2")) == (0.5, 0, -2)
