"""What a terminal is given: the text as it reads, and nothing that it obeys."""

import io
import re

from rich.table import Table
from rich.text import Text

from lit_alignment.terminal import Terminal, printable
from tests.helpers import write_jsonl
from tests.helpers.commands import command

HOSTILE = "\x1b[31mred\x1b]8;;http://x\x07\r\x9b2J\u202egnp.exe\u2066\ud800"
SHOWN = r"\x1b[31mred\x1b]8;;http://x\x07\r\x9b2J\u202egnp.exe\u2066\ud800"


def test_what_a_terminal_obeys_is_written_as_an_escape_and_any_script_stays():
    assert printable(HOSTILE) == SHOWN and printable(SHOWN) == SHOWN
    plain = "tab\there\nnaïve \u05e9\u05dc\u05d5\u05dd 你好 👩\u200d💻"
    assert printable(plain) == plain


def test_texts_in_tables_and_rules_are_no_markup_and_no_control_sequences():
    for colour in (False, True):
        stream = io.StringIO()
        console = Terminal(file=stream, is_terminal=colour, width=400)
        table = Table(title=f"[/bold]{HOSTILE}")
        table.add_row(Text(printable(HOSTILE), style="red"), f"[link=x]{HOSTILE}[/INST] :smile:")
        console.print(table)
        console.rule(f"[/x]{HOSTILE}")
        shown = stream.getvalue()
        if not colour:  # else colours stand in between
            assert shown.count(SHOWN) == 4 and f"[link=x]{SHOWN}[/INST] :smile:" in shown
        assert ("\x1b[" in shown) == colour and not re.search("\x1b\\]|\x1b.2J|[\x07\x9b\u202e\u2066\ud800]", shown)


def test_message_that_quotes_a_record_is_escaped_and_short(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "\x1b[2J\u202e" + "x" * 10_000, "content": ""}]}])
    result = command("sample", file, "--strategy", "random", "--form", "chats", "--out", str(tmp_path / "b"))
    assert result.returncode == 2
    assert r"field 'messages[0].role' is '\x1b[2J\u202exxx" in result.stderr and len(result.stderr) < 1000
    assert "\x1b" not in result.stderr and "\u202e" not in result.stderr
