"""Any value becomes plain JSON, or is refused with its place in the record and the limit that it exceeds."""

import datetime
import json
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest

from lit_alignment.data.sources.values import Misfit, RecordLimitsConfig, parse_json, plain
from lit_alignment.errors import ConfigError

LIMITS = RecordLimitsConfig(depth=3, digits=20)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, None, True, "é"]}, {"a": [1, None, True, "é"]}),
        (datetime.datetime(2026, 1, 31, 12, 30), "2026-01-31T12:30:00"),
        (datetime.date(2026, 1, 31), "2026-01-31"),
        (datetime.timedelta(seconds=90), 90.0),
        (Decimal("4.50"), 4.5),
        (Decimal("7.00"), 7),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        ("né".encode(), "né"),
        ((1, [np.float32(0.5), np.arange(2)]), [1, [0.5, [0, 1]]]),
        ({1: 2}, {"1": 2}),
        ({"bytes": b"\x89PNG", "path": None}, "data:;base64,iVBORw=="),
        ({"bytes": b"\x89PNG", "path": "a", "more": 1}, None),
    ],
)
def test_values_of_tables_and_configurations_become_json(value, expected):
    if expected is None:
        with pytest.raises(Misfit):
            plain(value)
        return
    assert plain(value) == expected
    json.dumps(plain(value), ensure_ascii=False, allow_nan=False).encode()


def test_nulls_of_a_table_are_left_out():
    row = {"a": None, "b": {"c": None, "d": [{"e": None}]}, "image": {"bytes": None, "path": "a.png"}}
    assert plain(row, table=True) == {"b": {"d": [{}]}, "image": "a.png"}
    assert plain(row) == row


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ({"a": [0, {"b": float("nan")}]}, "a[1].b", "is nan"),
        ({"a": float("-inf")}, "a", "is -inf"),
        ({"a": "x\ud800"}, "a", r"holds \\ud800, half of a surrogate pair"),
        ({"\udfff": 1}, "\udfff", "half of a surrogate pair"),
        ({"a": [[[1]]]}, "a[0][0]", "nested deeper than 3 levels"),
        ({"a": -(10**20)}, "a", "more than 20 digits"),
        ({"a": b"\xff"}, "a", "1 bytes that are no UTF-8 text"),
        ({"a": {1, 2}}, "a", "of the type set"),
    ],
)
def test_what_json_cannot_hold_is_named_with_its_place(value, field, words):
    with pytest.raises(Misfit, match=words) as caught:
        plain(value, LIMITS)
    assert caught.value.at("x.jsonl:3").field == field
    assert str(caught.value.at("x.jsonl:3", "arguments")).startswith("x.jsonl:3: field 'arguments")


def test_limits_hold_while_a_text_is_parsed_and_can_be_raised():
    for text, limit in (("[" * 100_000, "limits.depth"), ("9" * 5000, "limits.digits"), ("-" + "9" * 21, "digits")):
        with pytest.raises(Misfit) as caught:
            parse_json(text, LIMITS)
        assert limit in caught.value.fix
    assert parse_json("9" * 4000, RecordLimitsConfig(digits=4000)) == 10**4000 - 1
    assert plain([[[[[]]]]], RecordLimitsConfig(depth=5)) == [[[[[]]]]]
    with pytest.raises(Misfit, match="holds the key 'a' twice"):
        parse_json('{"b": {"a": 1, "a": 2}}')


@pytest.mark.parametrize("settings", [{"depth": 0}, {"depth": 201}, {"digits": 4301}, {"length": 0}])
def test_limits_that_python_does_not_reach_are_refused(settings):
    with pytest.raises(ConfigError, match=f"limits.{next(iter(settings))} is"):
        RecordLimitsConfig(**settings)
