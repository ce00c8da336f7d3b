"""The old settings, which remember what was read of them, and the notes that a conversion leaves."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from lit_alignment.errors import ConfigError

Kind = TypeVar("Kind")
NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
}
LONGEST_VALUE = 100
INDEX = re.compile(r"\[\d+\]")


class Notes:
    """What a user has to know about a conversion, each thing once."""

    def __init__(self) -> None:
        """Nothing has been said yet."""
        self.missing: list[str] = []
        self.unknown: list[str] = []
        self._warnings: dict[str, list[str]] = {}
        self._left_out: dict[str, list[str]] = {}

    def warn(self, key: str, text: str) -> None:
        """Say that what a setting did there works otherwise here; keys with the same text share a line."""
        _append(self._warnings, text, key)

    def leave_out(self, key: str, reason: str) -> None:
        """Say that a setting has no counterpart; keys with the same reason share a line."""
        _append(self._left_out, reason, key)

    @property
    def warnings(self) -> list[str]:
        """Lines about what works otherwise."""
        return _lines(self._warnings)

    @property
    def left_out(self) -> list[str]:
        """Lines about what is not carried over."""
        return _lines(self._left_out)


def _append(notes: dict[str, list[str]], text: str, key: str) -> None:
    keys = notes.setdefault(text, [])
    if key not in keys:
        keys.append(key)


def _lines(notes: dict[str, list[str]]) -> list[str]:
    return [f"{', '.join(_joined(keys))}: {text}" for text, keys in notes.items()]


def _joined(keys: list[str]) -> list[str]:
    """The keys; several that differ in a place in a list only are written as one, with [*] for the place."""
    patterns = {key: INDEX.sub("[*]", key) for key in keys}
    counts = Counter(patterns.values())
    return list(dict.fromkeys(key if counts[pattern] == 1 else pattern for key, pattern in patterns.items()))


class Settings:
    """An object of the old JSON; keys that nobody reads are found again by `unread`.

    Args:
        values: The object.
        path: Where it stands, as `a.b[0]`; "" at the top.
        notes: Where missing keys and keys without a counterpart are noted.
    """

    def __init__(self, values: dict[str, Any], path: str, notes: Notes) -> None:
        """Nothing has been read yet."""
        self.values, self.path, self.notes = values, path, notes
        self._read: set[str] = set()
        self._parts: dict[str, list[Settings]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def path_of(self, key: str) -> str:
        """The full path of a key."""
        return f"{self.path}.{key}" if self.path else key

    def maybe(self, key: str, kind: type[Kind]) -> Kind | None:
        """A value, or None where the key is missing or null.

        Raises:
            ConfigError: If the value is of another type.
        """
        self._read.add(key)
        value = self.values.get(key)
        return None if value is None else _checked(value, kind, self.path_of(key))

    def texts(self, key: str) -> list[str]:
        """A list of texts, or one text as a list; empty where it is missing."""
        value = self.raw(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        return [_checked(each, str, self.path_of(key)) for each in values]

    def take(self, key: str, default: Kind) -> Kind:
        """A value of the default's type, or the default where the key is missing or null."""
        value = self.maybe(key, type(default))
        return default if value is None else value

    def need(self, key: str, kind: type[Kind]) -> Kind:
        """A value that has to be there; without it an empty one, and the key is noted as missing."""
        value = self.maybe(key, kind)
        if value is None:
            self.notes.missing.append(self.path_of(key))
        return kind() if value is None else value

    def raw(self, key: str) -> Any:
        """A value of any type."""
        self._read.add(key)
        return self.values.get(key)

    def part(self, key: str) -> "Settings":
        """An object below this one, whose own keys are to be read; an empty one where it is missing."""
        if key not in self._parts:
            self._parts[key] = [Settings(self.maybe(key, dict) or {}, self.path_of(key), self.notes)]
        return self._parts[key][0]

    def parts(self, key: str) -> list["Settings"]:
        """The objects of a list below this one."""
        if key not in self._parts:
            values = [
                _checked(value, dict, f"{self.path_of(key)}[{index}]")
                for index, value in enumerate(self.maybe(key, list) or [])
            ]
            self._parts[key] = [
                Settings(value, f"{self.path_of(key)}[{index}]", self.notes) for index, value in enumerate(values)
            ]
        return self._parts[key]

    def leave_out(self, reason: str, *keys: str) -> None:
        """Note those of the keys that are given as not carried over, with their values where they are objects."""
        for key in keys:
            if key in self.values:
                value = self.raw(key)
                shown = f" {shorten(value)}" if isinstance(value, dict) and value else ""
                self.notes.leave_out(self.path_of(key) + shown, reason)

    def unread(self) -> Iterator[str]:
        """Paths of the keys that were not read, here and below."""
        for key in self.values:
            if key not in self._read:
                yield self.path_of(key)
            for part in self._parts.get(key, []):
                yield from part.unread()


def shorten(value: Any) -> str:
    """A value as JSON, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _checked(value: Any, kind: type[Kind], path: str) -> Kind:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    endless = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int) or endless:
        raise ConfigError(f"{path} is {shorten(value)}; turbo-alignment takes {NAMES[kind]} there.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ConfigError: If the file is no JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file.")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}).") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a configuration, it is nested too deep.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the file holds no object; a turbo-alignment configuration is one.")
    return values
