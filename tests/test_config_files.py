"""A file that is no configuration is one message, which does not repeat what stands in it."""

import pytest

from lit_alignment.config_files import MAX_NODES, read_file, read_layers, settings
from lit_alignment.errors import ConfigError
from tests.helpers.commands import command

SECRET = "hunter2hunter2"
NINE = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
FILES = {
    "empty": ("c.yaml", b"# nothing\n", "c.yaml: the file is empty"),
    "list": ("c.yaml", f"- {SECRET}\n".encode(), "c.yaml: a list, not settings by name"),
    "text": ("c.yaml", f"{SECRET}\nline\n".encode(), "c.yaml: a text, not settings by name"),
    "binary": ("c.yaml", bytes(range(256)), "c.yaml: no text, so no configuration"),
    "control": ("c.yaml", b"a: \x00\x01", "c.yaml: no text, so no configuration"),
    "records": ("c.jsonl", b'{"messages": []}\n', "c.jsonl: a file of records, no configuration"),
    "syntax": (
        "c.yaml",
        f"trainer:\n  a: {SECRET}\n b: [\n".encode(),
        "c.yaml:3:2: no valid YAML: did not find expected",
    ),
    "twice": ("c.yaml", f"a: {SECRET}\nb:\n  c: 1\n  c: 2\n".encode(), "c.yaml:4:3: 'c' stands twice, first in line 3"),
    "tag": ("c.yaml", b"a: !!python/object/apply:os.system [ls]\n", "c.yaml:1:4: the tag tag:yaml.org,2002:python/obj"),
    "bomb": ("c.yaml", f"a0: &a0 [x]\n{NINE}".encode(), f"anchors that write out to over {MAX_NODES} values"),
    "cycle": ("c.yaml", b"a: &a [1, *a]\n", "c.yaml:1:4: an anchor that holds itself"),
    "deep": ("c.yaml", b"[" * 100_000, "c.yaml:1:"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_file_is_one_message_without_its_content(name, tmp_path):
    file, content, words = FILES[name]
    (tmp_path / file).write_bytes(content)
    result = command("fit", "--config", str(tmp_path / file))
    (message,) = result.stderr.splitlines()
    assert result.returncode == 2 and words in message and SECRET not in message
    assert len(message) < 300


def test_missing_file_and_folder_are_named(tmp_path):
    for given, words in (("nowhere.yaml", "nowhere.yaml: no such file"), (str(tmp_path), "a folder, not a file")):
        for arguments in (["--config", given], [f"--config={given}"], ["-c", given]):
            assert words in command("fit", *arguments).stderr
    assert "--config needs a file" in command("fit", "--config").stderr


def test_anchors_and_merges_that_stay_small_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n")
    more = settings(settings(read_file(str(path)))["more"][1])
    assert {name: value.value for name, (_, value) in more.items()} == {"a": "1", "b": "3"}


def test_layers_stand_in_the_order_of_the_command_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"a": {"b": 1}}')
    layers = read_layers(["fit", "--a.b=2", "--config", str(path), "--a.c", "*", "--print_config", "--a.help"])
    assert [(layer.file, layer.keys, layer.root.value) for layer in layers if layer.keys] == [
        ("", ("a", "b"), "2"),
        ("", ("a", "c"), "*"),
    ]
    with pytest.raises(ConfigError, match="is empty"):
        path.write_text("")
        read_layers(["--config", str(path)])
