"""The options of the tools say what the tools take."""

from lit_alignment.checkpoints.export import DTYPES
from lit_alignment.tools import parsers
from lit_alignment.tools.convert.kinds import CONVERTERS, SHORT
from lit_alignment.tools.init.templates import METHODS
from lit_alignment.tools.inspect import STAGES


def choices(parser, option):
    return [*parser._option_string_actions[option].choices]


def test_choices_are_those_of_the_tools():
    assert choices(parsers.inspect(), "--split") == [*STAGES]
    assert choices(parsers.export(), "--dtype") == ["auto", *DTYPES]
    assert parsers.METHODS == [*METHODS]
    assert choices(parsers.convert(), "--kind") == [*SHORT, *CONVERTERS]
