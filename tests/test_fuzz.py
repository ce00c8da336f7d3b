"""Damaged files and configurations: one clear message each, or none is needed."""

import copy
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lit_alignment.cli import main
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import RecordError
from tests.helpers import ROOT

MANY = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each, max_size=3)
)
ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "train": True, "weight": 0.5}]
CHAT = {"id": "a", "messages": ASKED, "label": "x", "meta": {"n": 1}, "tools": [], "source": "web"}


def places(value, path=()):
    """Paths of all values inside a value."""
    yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*path, key))


@st.composite
def damaged(draw, value):
    """A value in which something is replaced, missing, or too much."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([path for path in places(value) if path] or [()]))
        if not path:
            return draw(JSON)
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                owner[path[-1]] = draw(JSON)
            case "remove":
                del owner[path[-1]]
            case _ if isinstance(owner, dict):
                owner[draw(st.text(max_size=8))] = draw(JSON)
            case _:
                owner.append(draw(JSON))
    return value


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".csv.gz", ".parquet"])
def test_damaged_file_is_read_or_refused_with_its_name(suffix, tmp_path):
    whole = "".join(json.dumps(CHAT) + "\n" for _ in range(3)).encode()

    @MANY
    @given(st.binary(max_size=40), st.integers(0, len(whole)), st.integers(0, 30))
    def try_it(junk, start, length):
        path = tmp_path / f"f{suffix}"
        path.write_bytes(whole[:start] + junk + whole[start + length :])
        try:
            list(SourceConfig(str(path)).read())
        except RecordError as error:
            assert str(error).startswith(str(path)) and error.fix

    try_it()


GOOD = yaml.safe_load((ROOT / "configs/sft/tiny.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.exhaustive) for part in (1, 2, 3))])
def test_damaged_configuration_is_taken_or_refused_with_one_message(part, tmp_path, capsys):
    """Through the command, up to the objects that it builds: no traceback, and exit code 2. Fifty in each part."""
    refused = 0

    @seed(part)
    @settings(MANY, max_examples=50, derandomize=False, database=None)
    @given(damaged({name: GOOD[name] for name in ("model", "data")}))
    def try_it(values):
        nonlocal refused
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True))
        code = main(["inspect", "--config", str(path), "--number", "0"])
        said = capsys.readouterr().err
        assert code in (0, 2)
        if code == 2:
            refused += 1
            (line,) = [line for line in said.splitlines() if line.startswith("lit-alignment: error: ")]
            assert len(line) > 30

    try_it()
    assert refused >= 25
