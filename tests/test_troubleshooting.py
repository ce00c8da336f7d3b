"""Messages that the page on troubleshooting quotes are those of the package."""

import re

from tests.helpers import ROOT

PAGE = (ROOT / "configs/guide/troubleshooting.md").read_text()
QUOTED = re.findall(r"^```text\nlit-alignment: error: (.*?)\n```$", PAGE, re.M | re.S)
# What Lightning and peft say behind a name of ours, and a message that is hardly more than values.
UNCHECKED = ("Trainer: ", "model.peft: Target modules", "data.init_args.encoding.truncation is")
ENOUGH = 20  # characters of a message that stand in the source as they are


def fixed_parts(source):
    """Of each string in a module the parts that are no values, in order."""
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # literals behind each other are one
    for literal in re.findall(r'"((?:[^"\\\n]|\\.)*)"', joined):
        parts = re.split(r"\{[^{}]*\}", literal)
        if sum(map(len, parts)) >= ENOUGH:
            yield parts


def quotes(message, parts):
    begin = 0
    for part in parts:
        begin = message.find(part, begin)
        if begin < 0:
            return False
        begin += len(part)
    return True


def test_quoted_messages_are_in_the_source():
    sources = [path.read_text() for path in (ROOT / "lit_alignment").rglob("*.py")]
    patterns = [parts for source in sources for parts in fixed_parts(source)]
    ours = [message for message in QUOTED if not message.startswith(UNCHECKED)]
    assert len(ours) >= 40
    assert [message for message in ours if not any(quotes(message, parts) for parts in patterns)] == []
