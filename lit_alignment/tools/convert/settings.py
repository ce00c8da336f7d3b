"""The old settings, which remember what was read of them, tables of what becomes of each key, and the notes."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lit_alignment.errors import ConfigError

Value = TypeVar("Value")
NAMES: dict[type[Any], str] = {dict: "an object", list: "a list", str: "a string"}
NAMES |= {bool: "true or false", int: "an integer", float: "a number"}
# Of the keys that a note is about: the loss and the step, the model, the data, measuring; then what is shown and kept.
IMPORTANCE = (
    r"^(?!cherry_pick).*(loss|smoothing|neftune|beta|fp16|bf16|ref_|learning_rate|optim|warmup|max_grad)",
    r"^(model|rm|tokenizer|retriever|generator|encoder|modality|peft)",
    r"^train",
    r"^(val|data|question|passage|metrics)",
    r"^(?!cherry_pick|resum|upload|logging|checkpoint)",
    r"",
)
Extras = tuple[dict[str, Any], dict[str, Any]]  # further settings of a module, and of its data module


@dataclass
class Notes:
    """What a user has to know about a conversion; texts stand with the keys that they are about."""

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def groups(self) -> tuple[list[str], list[str], list[str]]:
        """Lines about what works otherwise, about what is not carried over, and the unknown keys, weightiest first."""
        return _lines(self.changed), _lines(self.left_out), sorted(self.unknown, key=_rank)


def _rank(line: str) -> int:
    """How much a line matters: what is learned before what it is learned from, and what is only shown last."""
    keys = line.partition(": ")[0].split(", ")
    return next(rank for rank, pattern in enumerate(IMPORTANCE) if any(re.search(pattern, key) for key in keys))


def _lines(notes: dict[str, list[str]]) -> list[str]:
    """One line a text; keys that differ in a position in a list only are written as one, with [*] for it."""
    lines = []
    for text, keys in notes.items():
        patterns = {key: re.sub(r"\[\d+\]", "[*]", key) for key in keys}
        counts = Counter(patterns.values())
        joined = dict.fromkeys(key if counts[pattern] == 1 else pattern for key, pattern in patterns.items())
        lines.append(f"{', '.join(joined)}: {text}")
    return sorted(lines, key=_rank)


@dataclass
class Settings:
    """An object of the old JSON. Keys may lead into objects below, as `a.b`; `unread` finds those that nobody read."""

    values: dict[str, Any]
    path: str  # where it stands, as a.b[0]; "" at the top
    notes: Notes
    defaults: dict[str, Any] = field(default_factory=dict)  # go before the default of who reads
    _read: set[str] = field(default_factory=set)
    _parts: dict[str, list["Settings"]] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        first, _, rest = key.partition(".")
        return rest in self.part(first) if rest else key in self.values

    def path_of(self, key: str) -> str:
        """The full path of a key."""
        return ".".join(filter(None, (self.path, key)))

    def raw(self, key: str) -> Any:
        """A value of any type."""
        first, _, rest = key.partition(".")
        if rest:
            return self.part(first).raw(rest)
        self._read.add(key)
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def maybe(self, key: str, kind: type[Value]) -> Value | None:
        """A value, or None where the key is missing or null; of another type, it is a ConfigError."""
        value = self.raw(key)
        return None if value is None else _checked(value, kind, self.path_of(key))

    def take(self, key: str, default: Value) -> Value:
        """A value of the default's type, or the default where the key is missing or null."""
        value = self.maybe(key, type(default))
        return default if value is None else value

    def need(self, key: str) -> str:
        """A text that has to be there; without it an empty one, and the key is noted as missing."""
        if (value := self.maybe(key, str)) is None:
            self.notes.missing.append(self.path_of(key))
        return value or ""

    def require(self, *keys: str) -> None:
        """Note those of the keys that are not given as missing."""
        self.notes.missing += [self.path_of(key) for key in keys if key not in self]

    def part(self, key: str) -> "Settings":
        """An object below this one; an empty one where it is missing."""
        first, _, rest = key.partition(".")
        if rest:
            return self.part(first).part(rest)
        if key not in self._parts:
            self._parts[key] = [Settings(self.maybe(key, dict) or {}, self.path_of(key), self.notes)]
        return self._parts[key][0]

    def parts(self, key: str) -> list["Settings"]:
        """The objects of a list below this one."""
        if key not in self._parts:
            paths = {f"{self.path_of(key)}[{index}]": each for index, each in enumerate(self.maybe(key, list) or [])}
            self._parts[key] = [Settings(_checked(each, dict, path), path, self.notes) for path, each in paths.items()]
        return self._parts[key]

    def warn(self, text: str, key: str = "", ours: str = "", *, when: bool = True) -> None:
        """Say, if `when`, that what a key did there works otherwise here, in our key `ours` if that says more."""
        if when:
            self.notes.changed[text].append(self.path_of(key) + (f" -> {ours}" if ours else ""))

    def leave_out(self, reason: str, *keys: str, when: bool = True, shown: str = "") -> None:
        """Note, if `when`, the given ones of the keys as not carried over, with their values where they are objects."""
        for key in keys if when else ():
            value = self.raw(key)
            if key in self or value is not None:
                own = f" {shorten(value)}" if isinstance(value, dict) and value else ""
                self.notes.left_out[reason].append(self.path_of(key) + (shown or own))

    def unread(self) -> Iterator[str]:
        """Paths of the keys that were not read, here and below."""
        for key in self.values:
            if key not in self._read:
                yield self.path_of(key)
            for part in self._parts.get(key, []):
                yield from part.unread()

    def leave_out_rest(self, reason: str) -> None:
        """Note the keys that nobody has read yet as not carried over."""
        self.leave_out(reason, *[key for key in self.values if key not in self._read])


@dataclass(frozen=True)
class Row:
    """What becomes of one old key."""

    old: Any  # the type of a value that is written where it is given, or the old default, which is written out
    ours: str = ""  # our key, as a.b where it stands deeper; "" where it is the old one
    changed: bool = False  # whether only what differs from the old default is written
    make: Callable[[Any], Any] = lambda value: value  # our value for the old one; None is not written
    notes: tuple[str, ...] = ()  # what works otherwise here, told where the key is given


Table = Mapping[str, Row | str]  # a text says why the key, or the keys between its commas, have no counterpart


def carry(old: Settings, table: Table) -> dict[str, Any]:
    """What a table makes of an object: our keys and values, and the notes on it."""
    ours: dict[str, Any] = {}
    for key, row in table.items():
        if isinstance(row, str):
            old.leave_out(row, *key.split(", "))
            continue
        kind, default = (row.old, None) if isinstance(row.old, type) else (type(row.old), row.old)
        value = old.maybe(key, kind)
        for note in row.notes:
            old.warn(note, key, when=value is not None)
        value = row.make(default if value is None else value)
        if value is not None and not (row.changed and value == default):
            section, _, name = (row.ours or key).rpartition(".")
            (ours.setdefault(section, {}) if section else ours)[name] = value
    return ours


def shorten(value: Any) -> str:
    """A value as JSON, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _checked(value: Any, kind: type[Value], path: str) -> Value:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    endless = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int) or endless:
        raise ConfigError(f"{path} is {shorten(value)}; turbo-alignment takes {NAMES.get(kind, 'a value')} there.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; a ConfigError where it is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: no such file.") from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON ({problem}).") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a configuration ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the file holds no object; a turbo-alignment configuration is one.")
    return values
