"""From a parser's complaint to one line: file, key, and the nearest valid key."""

import dataclasses
import importlib
import inspect
import re
import typing
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

UNKNOWN = re.compile(r"(?:Subcommand '\w+'|Group '(?P<group>[\w.]+)') does not accept option '(?P<key>[\w.]+)'")
UNKNOWN_IN_CLASS = re.compile(r"Option '(?P<key>[\w.]+)' is not accepted")
UNRECOGNIZED = re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)")
CLASS_PATH = re.compile(r"Problem with given class_path '(?P<path>[\w.]+)'")
LINKED = {"tokenizer", "labels", "problem", "media"}  # what the module tells the data module
TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "ckpt_path", "config", "engine", "vllm")


def explain(message: str, arguments: list[str]) -> str:
    """One line about what is wrong with the configuration.

    Args:
        message: What the parser said, often nested.
        arguments: The command line, whose config files are searched for the offending line.
    """
    owners = CLASS_PATH.findall(message)
    if (found := UNRECOGNIZED.search(message)) or (found := UNKNOWN.search(message)):
        key = found["key"]
        group = found.groupdict().get("group")
        if group and owners:
            return _unknown(key, f"{owners[-1]}.{group}", _group_keys(owners[-1], group), arguments)
        head, _, last = key.rpartition(".")
        if head and head.partition(".")[0] not in TOP_LEVEL:
            head, last = "", head.partition(".")[0]
        candidates = list(inspect.signature(Trainer).parameters) if head == "trainer" else list(TOP_LEVEL)
        return _unknown(last or key, head or "the configuration", candidates, arguments)
    if found := UNKNOWN_IN_CLASS.search(message):
        owner = owners[-1] if owners else ""
        return _unknown(found["key"], owner, _class_keys(owner), arguments)
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        namespace = importlib.import_module(missing[1])
        names = [*getattr(namespace, "__all__", []), *(n for n in dir(namespace) if not n.startswith("_"))]
        return _unknown(missing[2], missing[1], names, arguments, kind="class")
    return _shortened(message)


def find_misfit(value: Any, kind: Any, key: str) -> str | None:
    """What is wrong with a null, or a list in place of settings, that the parser lets through; else None.

    Args:
        value: A part of the parsed configuration.
        kind: Its type.
        key: Its key.
    """
    if value is None:
        return None if kind is Any or type(None) in typing.get_args(kind) or kind is type(None) else f"{key} is null"
    kinds = [kind, *typing.get_args(kind)]
    takes_list = any(typing.get_origin(each) is list for each in kinds)
    if isinstance(value, list) and not takes_list and any(map(dataclasses.is_dataclass, kinds)):
        return f"{key} is a list, not settings by name"
    for each in kinds:
        if isinstance(value, list) and typing.get_origin(each) is list:
            (inner,) = typing.get_args(each)
            found = (find_misfit(one, inner, f"{key}[{number}]") for number, one in enumerate(value))
            return next(filter(None, found), None)
        if isinstance(value, dict) and typing.get_origin(each) is dict:
            inner = typing.get_args(each)[1]
            return next(filter(None, (find_misfit(one, inner, f"{key}.{name}") for name, one in value.items())), None)
        if isinstance(value, Namespace) and dataclasses.is_dataclass(each):
            return _misfit_in(value, typing.get_type_hints(each), key)
    if isinstance(value, Namespace) and str(value.get("class_path", "")).startswith("lit_alignment."):
        module, _, name = str(value.class_path).rpartition(".")
        given = value.get("init_args")
        hints = _arguments(getattr(importlib.import_module(module), name))
        return _misfit_in(given, hints, f"{key}.init_args") if isinstance(given, Namespace) else None
    return None


def _misfit_in(values: Namespace, hints: dict[str, Any], key: str) -> str | None:
    found = (
        find_misfit(values[name], hints[name], f"{key}.{name}")
        for name in vars(values)
        if name in hints.keys() - LINKED
    )
    return next(filter(None, found), None)


def _unknown(key: str, owner: str, candidates: list[str], arguments: list[str], kind: str = "key") -> str:
    close = get_close_matches(key.rpartition(".")[2], candidates, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(candidates)[:20])}."
    return f"{_place(key, arguments)}unknown {kind} '{key}' in {owner}. {hint}"


def _class_keys(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return list(_arguments(getattr(importlib.import_module(module), name)))


def _arguments(kind: Any) -> dict[str, Any]:
    """Names and types of what a class takes, those that it passes on to its bases as `**settings` included."""
    found: dict[str, Any] = {}
    for owner in (owner for owner in kind.__mro__ if "__init__" in vars(owner)):
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
        hints = typing.get_type_hints(owner.__init__)
        named = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        found = {name: hints.get(name, Any) for name in named} | found
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return found


def _group_keys(path: str, group: str) -> list[str]:
    """Fields of the dataclass that a class takes under this name."""
    module, _, name = path.rpartition(".")
    kind: object = getattr(importlib.import_module(module), name)
    for step in group.split("."):
        kind = _arguments(kind).get(step) if isinstance(kind, type) else None
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _place(key: str, arguments: list[str]) -> str:
    """`file:line: ` of a key or value in the given config files, or nothing if it came from the command line."""
    word = re.compile(rf"[\"']?\b{re.escape(key.rpartition('.')[2])}\b")
    files = [b for a, b in pairwise(arguments) if a in ("--config", "-c")]
    files += [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    for file in reversed(files):
        if Path(file).is_file():
            for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
                if word.search(line.partition("#")[0]):
                    return f"{file}:{number}: "
    return ""


def _shortened(message: str) -> str:
    """The first line, the innermost reasons, and the value."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value type:",
        "Given value: {",
        "Subclass types expect one of:",
        "- a class path (str)",
        "- a dict with",
        "- Expected a <class 'NoneType'>",
    )
    kept = [line.removeprefix("- ") for line in lines if not line.startswith(noise)]
    shown = [re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", line) for line in kept]
    return " ".join(dict.fromkeys(line if len(line) < 300 else line[:300] + " ..." for line in shown))
