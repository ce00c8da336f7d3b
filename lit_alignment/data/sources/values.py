"""Values of records as plain JSON, whatever they were read from, and within the limits of a record."""

import base64
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cache
from typing import Any
from uuid import UUID

import numpy as np

from lit_alignment.errors import ConfigError, RecordError

# A half of a pair in JSON's own escapes, unless a backslash before it makes it a text.
LONE_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
DEEPEST = 200  # what json, templates and copies of a record take before Python's own limit of recursion


@dataclass(frozen=True)
class RecordLimitsConfig:
    """What a record may hold at most; a larger one is an error that names the limit.

    Args:
        length: Characters in a line of JSONL.
        depth: Lists and objects inside of each other, up to 200.
        digits: Digits of a whole number, up to 4300.
    """

    length: int = 100_000_000
    depth: int = 100
    digits: int = 300

    def __post_init__(self) -> None:
        """Refuse limits beyond what Python itself can read."""
        for name, most in (("length", None), ("depth", DEEPEST), ("digits", 4300)):
            value = getattr(self, name)
            if value < 1 or (most is not None and value > most):
                raise ConfigError(f"limits.{name} is {value}; use 1 or more{most and f', up to {most}'}.")


LIMITS = RecordLimitsConfig()


class Misfit(ValueError):
    """A value that no record can hold: where in the record, what is wrong, and the fix."""

    def __init__(self, problem: str, fix: str) -> None:
        """Begin at the value; those around it add their keys."""
        super().__init__(problem)
        self.path, self.problem, self.fix = "", problem, fix

    def inside(self, key: str | int) -> "Misfit":
        """The same, seen from the list or object that holds it under this key."""
        step = f"[{key}]" if isinstance(key, int) else f".{key}"
        self.path = step + self.path
        return self

    def at(self, where: str, field: str = "") -> RecordError:
        """The error of a record."""
        return RecordError(where, f"{field}{self.path}".removeprefix("."), self.problem, self.fix)


class _NotFinite(Exception):
    """A number that JSON does not have; where it stands is found in a second reading."""


@cache
def _decoder(limits: RecordLimitsConfig) -> json.JSONDecoder:
    def whole(digits: str) -> int:
        if len(digits.removeprefix("-")) > limits.digits:
            raise _too_many_digits(limits)
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise _NotFinite
        return number

    return json.JSONDecoder(object_pairs_hook=_object, parse_int=whole, parse_float=real, parse_constant=real)


def parse_json(text: str, limits: RecordLimitsConfig = LIMITS, check: bool = True) -> Any:
    """The value of a JSON text, as `plain` has it; it is looked through only where the text gives reason to.

    Args:
        text: The text.
        limits: What it may hold at most.
        check: False leaves it to the caller to look through the value, as where that is a list of records.

    Raises:
        json.JSONDecodeError: If it is no JSON.
        Misfit: If an object has a key twice, or it is beyond the limits.
    """
    try:
        value = _decoder(limits).decode(text)
        is_deep = text.count("[") + text.count("{") > limits.depth
        if not (check and (is_deep or ("\\u" in text and LONE_SURROGATE.search(text)))):
            return value
    except _NotFinite:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep(limits) from error
    return plain(value, limits) if check else value


def plain(value: Any, limits: RecordLimitsConfig = LIMITS, table: bool = False, depth: int = 0) -> Any:
    """A value in the types of JSON, all of which can be written as UTF-8.

    Dates become ISO texts, durations seconds, decimals numbers, and bytes texts; images and sounds as Hugging Face
    datasets keeps them (`bytes` and `path`) become data URLs.

    Args:
        value: As read.
        limits: What it may hold at most.
        table: Leave out nulls: a table gives each row all keys that any row has, such as those of other rows' tool
            arguments.
        depth: Lists and objects around it.

    Raises:
        Misfit: If there is no such value.
    """
    match value:
        case str():
            return value if value.isascii() else encodable(value)
        case None | bool():
            return value
        case int():
            if value.bit_length() > 3 * limits.digits and abs(value) >= 10**limits.digits:
                raise _too_many_digits(limits)
            return value
        case float():
            if not math.isfinite(value):
                raise Misfit(f"is {value}", "Give a finite number, or null.")
            return value
        case {"bytes": bytes(content), "path": _, **rest} if not rest:
            return f"data:;base64,{base64.b64encode(content).decode()}"
        case {"bytes": None, "path": str(path), **rest} if table and not rest:
            return encodable(path)
        case dict() | list() | tuple():
            return _plain_items(value, limits, table, depth)
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return plain(int(value) if value.is_finite() and value == int(value) else float(value))
        case UUID():
            return str(value)
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                fix = "Store it as text, as {bytes, path}, or take it out."
                raise Misfit(f"is {len(value)} bytes that are no UTF-8 text", fix) from error
        case np.generic() | np.ndarray():
            return plain(value.tolist(), limits, table, depth)
    raise Misfit(
        f"is of the type {type(value).__name__}", "Give a value that JSON has: a text, number, list or object."
    )


def _plain_items(value: Any, limits: RecordLimitsConfig, table: bool, depth: int) -> Any:
    if depth >= limits.depth:
        raise _too_deep(limits)
    key: Any = None
    try:
        if not isinstance(value, dict):
            items = []
            for key, each in enumerate(value):  # noqa: B007 - an error names it
                items.append(plain(each, limits, table, depth + 1))
            return items
        found = {}
        for key, each in value.items():
            if each is not None or not table:
                name = key if isinstance(key, str) else str(key)
                found[name if name.isascii() else encodable(name)] = plain(each, limits, table, depth + 1)
        return found
    except Misfit as misfit:
        raise misfit.inside(key if isinstance(key, str | int) else str(key)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Misfit(f"holds the key {twice!r} twice", "Keep one of them.")
    return found


def encodable(text: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
        Misfit: If not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise Misfit(f"holds {half}, half of a surrogate pair, which is no character", "Take it out.") from error
    return text


def _too_deep(limits: RecordLimitsConfig) -> Misfit:
    return Misfit(
        f"is nested deeper than {limits.depth} levels",
        f"Flatten it, or raise limits.depth of its source (up to {DEEPEST}).",
    )


def _too_many_digits(limits: RecordLimitsConfig) -> Misfit:
    fix = "Write it as a text, or raise limits.digits of its source (up to 4300)."
    return Misfit(f"has a whole number of more than {limits.digits} digits", fix)
