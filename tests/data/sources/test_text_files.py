"""Which files of a folder are read as text, and what is said of the others."""

import os

from lit_alignment.data.sources.text_files import TEXT_SUFFIXES, text_files


def test_other_files_are_counted_and_not_read(tmp_path):
    outside = tmp_path / "outside.md"
    outside.write_text("secret")
    root = tmp_path / "notes"
    for name in (
        "b.md",
        "a/z.TXT",
        "a-b.rst",
        "a/inner/deep.markdown",
        ".hidden.md",
        ".git/config.md",
        "x.png",
        "Makefile",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    (root / "raw.txt").write_bytes(b"ab\0cd")
    (root / "windows.txt").write_bytes("text".encode("utf-16"))  # reading it says how it is converted
    (root / "link.md").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.md")
    found = text_files(root, TEXT_SUFFIXES)
    names = ["a-b.rst", "a/inner/deep.markdown", "a/z.TXT", "b.md", "windows.txt"]
    assert [found.name_of(file) for file in found.files] == names
    assert found.line() == (
        "5 files of text; skipped: 3 of other kinds (.md 1, .png 1, no suffix 1), 2 hidden, 2 links, 1 binary"
    )


def test_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.md").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [file.name for file in text_files(tmp_path / "link", TEXT_SUFFIXES).files] == ["a.md"]
