"""Passages of a folder of text: their ids, titles and texts, and which folders are refused."""

import re

import pytest

from lit_alignment.data.passages import PassageSourceConfig
from lit_alignment.errors import ConfigError, RecordError


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / "z.txt").write_bytes(b"\xef\xbb\xbfOne two.\r\nThree.\r\n\r\nFour.\r\n")
    (folder / "sub/guide.md").write_text("# Setup\n\nUnpack it.\n\n## Linux\nRun make.\n")
    return folder


def test_passages_have_the_files_path_and_heading_as_title_and_a_number_as_id(notes):
    expected = [
        (f"{notes}/sub/guide.md:3", "sub/guide.md#1", "sub/guide.md: Setup", "Unpack it."),
        (f"{notes}/sub/guide.md:6", "sub/guide.md#2", "sub/guide.md: Setup > Linux", "Run make."),
        (f"{notes}/z.txt:1", "z.txt#1", "z.txt", "One two.\nThree.\n\nFour."),
    ]
    found = [(where, *raw.values()) for where, raw in PassageSourceConfig(str(notes)).read()]
    assert found == expected
    (alone,) = PassageSourceConfig(f"{notes}/z.txt").read()
    assert alone == (expected[-1][0], {"id": "z.txt#1", "title": "z.txt", "text": "One two.\nThree.\n\nFour."})


def test_settings_of_the_source_cut_and_name_them(notes):
    short = [raw for _, raw in PassageSourceConfig(f"{notes}/z.txt", max_words=3).read()]
    assert [(each["id"], each["text"]) for each in short] == [("z.txt#1", "One two.\nThree."), ("z.txt#2", "Four.")]
    named = next(raw for _, raw in PassageSourceConfig(str(notes), name="mine").read())
    assert (named["id"], named["title"]) == ("mine/sub/guide.md#1", "mine/sub/guide.md: Setup")
    (notes / "code.py").write_text("# a comment\nx = 1\n")
    (code,) = PassageSourceConfig(str(notes), suffixes=[".py"]).read()
    assert code[1] == {"id": "code.py#1", "title": "code.py", "text": "# a comment\nx = 1"}


def test_folder_of_records_and_text_is_asked_about(notes):
    (notes / "a.jsonl").write_text('{"text": "record"}\n')
    message = "holds records (a.jsonl) and text (sub/guide.md, z.txt). Say which are the passages: path: "
    with pytest.raises(ConfigError, match=re.escape(message)):
        PassageSourceConfig(str(notes)).files()
    assert len(list(PassageSourceConfig(str(notes), suffixes=[".md", ".txt"]).read())) == 3
    (notes / "sub/guide.md").rename(notes / "README.md")
    (notes / "z.txt").unlink()
    assert [raw for _, raw in PassageSourceConfig(str(notes)).read()] == [{"text": "record"}]


def test_data_set_with_a_card_is_one_of_records(notes):
    (notes / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/*.jsonl\n---\n")
    (notes / "data").mkdir()
    (notes / "data/a.jsonl").write_text('{"text": "record"}\n')
    assert [file.name for file in PassageSourceConfig(str(notes)).files()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"fine\nna\xefve\n",
            "bad.md:2: not UTF-8 text. Save the file as UTF-8; one from Windows by: iconv -f cp1252 ",
        ),
        (
            "text".encode("utf-16"),
            "bad.md:1: not UTF-8 text. Save the file as UTF-8; one from Windows by: iconv -f utf-16",
        ),
    ],
)
def test_file_in_another_encoding_is_named_with_its_line(notes, content, message):
    (notes / "bad.md").write_bytes(content)
    with pytest.raises(RecordError, match=re.escape(message)):
        list(PassageSourceConfig(str(notes)).read())


def test_folder_without_text_says_what_it_holds(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    message = "0 files of text; skipped: 1 of other kinds (.pdf 1). Give a folder with files of text (.md, .markdown"
    with pytest.raises(ConfigError, match=re.escape(message)):
        PassageSourceConfig(str(tmp_path)).files()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_words": 0}, "max_words is 0; use 1 or more"),
        ({"suffixes": []}, r"suffixes are \[\]; write ends of names"),
        ({"suffixes": ["md"]}, r"suffixes are \['md'\]; write ends of names"),
        ({"suffixes": [".csv"]}, r"suffixes are \['.csv'\]; write ends of names"),
        ({"columns": {"text": "body"}}, "holds text, which has no columns"),
    ],
)
def test_settings_that_cut_nothing_are_refused(notes, settings, message):
    with pytest.raises(ConfigError, match=message):
        list(PassageSourceConfig(str(notes), **settings).read())
