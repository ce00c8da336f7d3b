"""A file of predictions: lines of other prompts, damage, and what says how they were made."""

import json

import pytest

from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.generation.prediction_file import PredictionFile

ASKED = {("d", "1"): "a", ("d", "2"): "b", ("d", "3"): "c"}


def line(id, fingerprint, **rest):
    return {"dataset": "d", "id": id, "fingerprint": fingerprint, **rest}


def written(file):
    return [json.loads(each) for each in file.path.read_text().splitlines()]


def test_answer_to_an_earlier_prompt_never_takes_the_place_of_the_new_one(tmp_path):
    """Whichever rank has left it, in whichever file."""
    files = [PredictionFile(tmp_path / "a.jsonl", rank) for rank in range(3)]
    files[0].append([line("1", "a"), line("2", "old")])
    files[1].append([line("1", "old"), line("2", "b")])
    files[2].append([line("2", "old"), line("3", "old"), line("4", "old")])
    answered, changed = files[0].answered(ASKED)
    assert answered == {("d", "1"), ("d", "2")} and changed == {("d", "3")}
    files[0].finish(ASKED)
    assert written(files[0]) == [line("1", "a"), line("2", "b"), line("4", "old")]
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"oops", "not valid JSON"),
        (b'{"dataset": "d", "id": "1"', "not valid JSON"),
        (b'{"dataset": "d", "id": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"dataset": "d", "id": "\\ud800"}', "not valid JSON"),
        (b'{"dataset": "d", "id": "1", "answers": ["\\udfff"]}', "not valid JSON"),
        (b"5", "no prediction"),
        (b"[]", "no prediction"),
        (b'{"id": "1"}', "no prediction"),
        (b'{"dataset": "d", "id": 1}', "no prediction"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.partial0", "a.jsonl.partial7"])
def test_broken_line_is_named(tmp_path, bad, problem, name):
    good = json.dumps(line("1", "a")).encode() + b"\n"
    (tmp_path / name).write_bytes(good + bad + b"\n" + good)
    with pytest.raises(RecordError, match=rf"{name}:2: {problem}.*Remove the line; it is answered again"):
        PredictionFile(tmp_path / "a.jsonl").answered(ASKED)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.partial0", "a.jsonl.partial7"])
def test_cut_off_end_is_answered_again(tmp_path, name):
    """At any byte of its last line, one within a character included."""
    whole = json.dumps(line("1", "a"), ensure_ascii=False).encode() + b"\n"
    last = json.dumps(line("2", "b", text="\u00e9"), ensure_ascii=False).encode()
    for size in range(len(last)):
        (tmp_path / name).write_bytes(whole + last[:size])
        file = PredictionFile(tmp_path / "a.jsonl")
        file.repair()
        assert file.answered(ASKED) == ({("d", "1")}, set())
        file.append([line("2", "b", text="\u00e9"), line("3", "c")])
        file.finish(ASKED)
        assert [each["id"] for each in written(file)] == ["1", "2", "3"]
        file.remove()


@pytest.mark.parametrize("manifest", [b"", b'{"model": "x', b"[]", b"5", b"\xff", b"[" * 100_000, b"{}", None])
def test_damaged_settings_are_one_message_where_there_are_answers(tmp_path, manifest):
    file = PredictionFile(tmp_path / "a.jsonl")
    if manifest is not None:
        file.manifest.write_bytes(manifest)
    file.check_settings({"model": "x"})  # nothing is answered
    file.append([line("1", "a")])
    with pytest.raises(ConfigError, match=r"a.settings.json: missing or damaged.*new folder, or overwrite: true"):
        file.check_settings({"model": "x"})
    file.write_settings({"model": "x"})
    file.check_settings({"model": "x"})


def test_append_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = PredictionFile(tmp_path / "a.jsonl")
    file.append([line("1", "a")])
    before = file.partial.read_bytes()
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match=r"a.jsonl.partial0: cannot be written \(No space left on device\)"):
        file.append([line("2", "b")])
    assert file.partial.read_bytes() == before
