"""Options of the tools: full names, numbers within bounds, one message."""

import argparse
from pathlib import Path

import pytest

from lit_alignment.errors import ConfigError
from lit_alignment.tools import parsers
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


def test_options_and_positional_arguments_stand_in_any_order():
    chat, report, index, serve = parsers.chat(), parsers.report(), parsers.index(), parsers.serve()
    for words in ("m --seed 1 hi", "m hi --seed 1", "--seed 1 m hi", "--seed=1 m -- hi"):
        options = chat.parse_args(words.split())
        assert (options.source, options.question, options.seed) == ("m", "hi", 1), words
    assert chat.parse_args(["m", "-1 + 1?"]).question == "-1 + 1?"
    assert chat.parse_args(["m", "--", "--a"]).question == "--a"
    assert report.parse_args(["a", "--out", "x", "b"]).runs == [Path("a"), Path("b")]
    for words in ("build --config c --overwrite", "--config c --overwrite build", "--overwrite --config c build"):
        options, rest = index.split(words.split())
        assert (options.action, options.overwrite, rest) == ("build", True, ["--config", "c"])
    assert index.split(["--print_config", "build"])[1] == ["--print_config"]
    for words in ("m --lora-modules a=b c=d --port 1 --flag", "--port 1 m --lora-modules a=b c=d --flag"):
        options, rest = serve.parse_known_args(words.split())
        assert (options.source, options.port) == ("m", 1) and rest == ["--lora-modules", "a=b", "c=d", "--flag"]


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "x", "", "1e400"])
def test_number_that_is_no_positive_one_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        positive()(text)


def test_numbers_are_read():
    assert (positive(1)("0.5"), whole(0)("0"), whole(-3)("-2")) == (0.5, 0, -2)
