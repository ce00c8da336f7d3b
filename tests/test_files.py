"""A file is written whole or not at all, and an error of the disk names it."""

import errno

import pytest

from lit_alignment.errors import disk_message
from lit_alignment.files import naming, replaced


def test_file_that_is_not_written_to_its_end_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "new" / "page.html"
    with replaced(path) as file:
        file.write("whole")
    with pytest.raises(OSError) as caught, replaced(path) as file:
        file.write("cut")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [each.name for each in path.parent.iterdir()] == ["page.html"] and path.read_text() == "whole"
    assert str(disk_message(caught.value)).startswith(f"{path}: no space left on device. Make room")


def test_error_that_names_a_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        (tmp_path / "read").read_text()
    assert caught.value.filename == str(tmp_path / "read")


def test_error_of_ours_keeps_its_message(tmp_path):
    with pytest.raises(FileNotFoundError, match="^no.jsonl: no such file$"), naming(tmp_path):
        raise FileNotFoundError("no.jsonl: no such file")
