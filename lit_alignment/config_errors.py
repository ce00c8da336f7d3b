"""What is wrong with a configuration, in one line: file, key, value, and the nearest valid one."""

import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from math import isfinite
from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse._common import is_subclasses_disabled
from jsonargparse._typehints import (
    get_all_subclass_paths,
    resolve_class_path_by_name,
)
from jsonargparse._util import get_import_path, import_object
from lightning.pytorch import Trainer

from lit_alignment.config_files import Layer, find_node, line_of, locate, node_at, settings
from lit_alignment.config_types import (
    alternatives,
    arguments_of,
    classes_in,
    is_list,
    item_of,
    only_class,
    supplied,
    values_in,
)
from lit_alignment.errors import ConfigError

LINKED = {"tokenizer", "labels", "problem", "media"}  # what the module tells the data module
SPEC = ("class_path", "init_args", "dict_kwargs")
OPTIONS = ("config", "help", "print_config")
DEFAULT = "give a value, or leave it out for the default."


class Checker:
    """Looks for keys and classes that do not exist, in all layers, before the parser sees them.

    Args:
        hints: Type of each key of the configuration.
    """

    def __init__(self, hints: dict[str, Any]) -> None:
        """No class is known yet."""
        self.hints = hints
        self.classes: dict[str, Any] = {}  # by key; a later layer need not repeat its `class_path`

    def check(self, layers: list[Layer]) -> None:
        """Refuse the first unknown key or class.

        Raises:
            ConfigError: Naming file, line, key, and the nearest valid one.
        """
        for layer in layers:
            if layer.keys:
                self._option(layer)
            else:
                self._settings(layer.root, self.hints, "", layer, None, [*self.hints])

    def _option(self, layer: Layer) -> None:
        """Follow the key of an option to its type, through classes named before."""
        hint: Any = None
        hints, key, prefix, owner = self.hints, "", "", None
        names = [name.removesuffix("+") for name in layer.keys]
        for name in names:
            if key and name in SPEC:
                if name == "class_path":
                    self._value(layer.root, hint, key, layer)
                if name != "init_args":
                    return
                continue
            if key:
                kind = self.classes.get(key) or only_class(classes_in(hint))
                if kind is None:  # in lists, dictionaries, and classes not yet known, the parser has to find its way
                    return
                hints, owner, prefix = arguments_of(kind), kind, _prefix(key, kind)
            if name not in hints:
                known, place = [*hints, *OPTIONS[len(key) :]], f"--{'.'.join(names)}: "
                raise ConfigError(_unknown(name, owner, known, place, self._below(hints, prefix)))
            key, hint = f"{prefix}{name}", hints[name]
        single = layer.keys[-1].endswith("+") and not isinstance(layer.root, yaml.SequenceNode)
        self._value(layer.root, item_of(hint) if single else hint, key, layer)

    def _settings(
        self, node: yaml.Node, hints: dict[str, Any], prefix: str, layer: Layer, owner: Any, known: Sequence[str]
    ) -> None:
        for name, (place, value) in settings(node).items():
            if name not in hints:
                raise ConfigError(_unknown(name, owner, known, line_of(place, layer), self._below(hints, prefix)))
            self._value(value, hints[name], f"{prefix}{name}", layer)

    def _below(self, hints: dict[str, Any], prefix: str) -> list[str]:
        """Keys of the settings below these, nearest first."""
        found, parts = [], [(name, f"{prefix}{name}", hint) for name, hint in hints.items()]
        while parts:
            short, key, hint = parts.pop(0)
            kind = self.classes.get(key) or only_class(classes_in(hint))
            if inspect.isclass(kind):
                inner = arguments_of(kind)  # type: ignore[arg-type]
                found += [f"{short}.{name}" for name in inner]
                parts += [(f"{short}.{name}", f"{_prefix(key, kind)}{name}", each) for name, each in inner.items()]
        return found

    def _value(self, node: yaml.Node, hint: Any, key: str, layer: Layer) -> None:
        """Look into the value of a key."""
        classes, values = classes_in(hint), values_in(hint)
        if isinstance(node, yaml.SequenceNode):
            for known in [known for known in self.classes if known.startswith(f"{key}[")]:
                del self.classes[known]  # a list takes the place of an earlier one
            for number, item in enumerate(node.value):
                self._value(item, item_of(hint), f"{key}[{number}]", layer)
        elif isinstance(node, yaml.MappingNode) and classes:
            self._class(node, classes, key, layer, supplied(hint))
        elif isinstance(node, yaml.MappingNode) and values is not None:
            for name, (_, value) in settings(node).items():
                self._value(value, values, f"{key}.{name}", layer)
        elif classes and node.tag.endswith(":str") and str not in alternatives(hint) and "/" not in str(node.value):
            if not all(map(is_subclasses_disabled, classes)):
                self.classes[key] = _resolved(node, classes, key, layer)

    def _class(self, node: yaml.MappingNode, classes: list[Any], key: str, layer: Layer, supplied: int) -> None:
        """Look into the settings of a class, with or without `class_path`.

        Args:
            node: The settings.
            classes: What it may be.
            key: Its key.
            layer: Where it stands.
            supplied: How many of its first arguments are no settings.
        """
        keys = settings(node)
        if "class_path" in keys:
            kind = _resolved(keys["class_path"][1], classes, key, layer)
        else:
            kind = self.classes.get(key) or only_class(classes)
        if kind is None:
            raise ConfigError(f"{line_of(node, layer)}{key}: class_path is missing. Give one.")
        self.classes[key] = kind
        if not inspect.isclass(kind):  # a function that makes one
            return
        hints, prefix = arguments_of(kind), _prefix(key, kind)  # type: ignore[arg-type]
        if not {"class_path", "init_args"} & keys.keys():
            return self._settings(node, hints, prefix, layer, kind, [*hints, *SPEC])
        for name, (place, _) in keys.items():
            if name not in SPEC:
                raise ConfigError(_unknown(name, key, SPEC, line_of(place, layer)))
        if "init_args" in keys:
            for name in [name for name in [*hints][:supplied] if name in settings(keys["init_args"][1])]:
                where = line_of(settings(keys["init_args"][1])[name][0], layer)
                raise ConfigError(f"{where}{prefix}{name} follows from the settings beside {key}. Remove it.")
            self._settings(keys["init_args"][1], hints, prefix, layer, kind, [*hints])


def _resolved(node: yaml.Node, classes: list[Any], key: str, layer: Layer) -> Any:
    """The class of a `class_path` or of a class's short name.

    Raises:
        ConfigError: If there is none, or it is of another kind; with the nearest one.
    """
    name, place = str(node.value), line_of(node, layer)
    found: Any = None
    try:
        found = import_object(resolve_class_path_by_name(tuple(classes), name))
    except (ImportError, AttributeError, ValueError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ImportError) and missing and missing != name.partition(".")[0] and "." not in missing:
            raise ConfigError(f"{place}{key}: {name} needs the package {missing}, which is not installed.") from error
        if not all(map(is_subclasses_disabled, classes)):
            lacks = f" (no package {missing} is installed)" if missing == name.partition(".")[0] else ""
            raise ConfigError(
                f"{place}{key}: unknown class '{name}'{lacks}. {_nearest_class(name, classes)}"
            ) from error
    if all(map(is_subclasses_disabled, classes)) and found not in classes:
        raise ConfigError(f"{place}{key} takes no class_path, only the settings of {_names(classes)}.")
    if inspect.isclass(found) and not issubclass(found, tuple(classes)):
        raise ConfigError(f"{place}{key}: {name} is no {_names(classes)}. {_nearest_class(name, classes)}")
    return found


def _nearest_class(name: str, classes: list[Any]) -> str:
    """The class that was meant, if one has a name near to this one; else what there is."""
    ours = _public().values()  # classes are known once they are imported
    paths = {path.rpartition(".")[2]: path for kind in classes for path in get_all_subclass_paths(kind)}
    paths |= {short: path for path in ours if (short := path.rpartition(".")[2]) in paths}
    by_case = {short.lower(): path for short, path in paths.items()}
    close = get_close_matches(name.rpartition(".")[2].lower(), by_case, n=1)
    shown = [path for path in paths.values() if path.count(".") == 1] or [*paths.values()]  # public ones, if there are
    return f"Did you mean '{by_case[close[0]]}'?" if close else f"Known: {', '.join(sorted(shown)[:12])}."


def explain(message: str, layers: list[Layer], command: str, classes: dict[str, Any]) -> str:
    """One line about what the parser does not take.

    Args:
        message: What the parser said, often nested.
        layers: The settings, which are searched for the offending line.
        command: What was to be run.
        classes: Those that were found in the settings, by key.
    """
    if missing := re.search(r"class_path '([\w.]+)':\s+the following arguments are required: (\S+)", message):
        return _incomplete(import_object(missing[1]), missing[2].rstrip(","), layers, classes)
    if missing := re.search(r"arguments are required: (.+)", message):
        if not any(layer.file for layer in layers):
            return f"{command}: no configuration. Give one with --config FILE; `lit-alignment init sft` writes one."
        parts = " and ".join(part.rpartition(".")[2] for part in missing[1].split(", "))
        return f"{layers[-1].file or layers[0].file}: the configuration has no {parts}. Give its class_path."
    if extra := re.search(r"unrecognized arguments: (\S+)", message):
        return f"'{extra[1]}' is no option. Give a configuration with --config FILE, and a setting with --key value."
    if option := re.search(r"argument (\S+): expected one argument", message):
        return f"{option[1].rpartition('/')[2]} needs a value."
    if refused := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
        return f"{refused[1]} has no setting '{refused[2]}'. Give its key a class_path first, with one that has it."
    steps = re.findall(r"Parser key \"([^\"]+)\"|Problem with given class_path '([\w.]+)'", message)
    key = ""
    for name, class_path in steps:
        if name and not key.endswith(name):
            key += f".{name}" if key else name
        elif class_path and _takes_class_path(class_path) and not key.endswith(".init_args"):
            key += ".init_args"
    place, value = locate(layers, key.removeprefix(f"{command}."))
    if wanted := expected(message[max(0, message.rfind("Parser key")) :]):  # before it are alternatives to it
        shown = f"is {value}" if value else "is wrong"
        return f"{place}{key} {shown}; expected {wanted}."
    return f"{place}{key}{': ' if key else ''}{_shortened(message)}"


def _incomplete(kind: Any, argument: str, layers: list[Layer], classes: dict[str, Any]) -> str:
    """That a class lacks what it cannot do without, and in which line."""
    places = [(key, found) for key, each in classes.items() if each is kind and (found := find_node(layers, key))]
    lacking = (place for place in places if node_at(place[1][1], [argument]) is None)
    key, (layer, node) = next(lacking, places[0]) if places else ("", (layers[-1], None))
    where = f"{line_of(node, layer)}{key}: " if node is not None else ""
    below = "" if is_subclasses_disabled(kind) else " under init_args"
    return f"{where}{_name(kind)} needs '{argument}', which is missing. Give it{below}."


def _takes_class_path(name: str) -> bool:
    """Whether a class has its settings under `init_args`; what is no class has none."""
    try:
        return not is_subclasses_disabled(import_object(name))
    except (ImportError, AttributeError, ValueError):
        return False


def expected(message: str) -> str:
    """What would be right, of a parser's complaint; empty where it does not say."""
    found: dict[str, None] = {}
    for text in re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, flags=re.MULTILINE):
        if text.startswith("typing.Literal["):
            choices = [choice.strip(" '\"") for choice in text[len("typing.Literal[") : -1].split(",")]
            found[", ".join(choices)] = None
        elif not text.startswith(("path but", "dot import path")):
            found[re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)] = None
    found.pop("NoneType", None)  # of any level of alternatives
    found |= dict.fromkeys(f"settings of {name}" for name in re.findall(r"Not a valid subclass of (\w+)", message))
    if "Unable to load config" in message:
        found = {"settings by name": None}
    return " or ".join(found)


def find_misfit(value: Any, kind: Any, key: str) -> str | None:
    """What is wrong with a null, or other settings than a part takes, that the parser lets through; else None.

    Args:
        value: A part of the parsed configuration.
        kind: Its type.
        key: Its key.
    """
    if value is None:
        optional = kind is Any or type(None) in typing.get_args(kind) or kind is type(None)
        return None if optional else f"{key} is null; {DEFAULT}"
    classes, values = classes_in(kind), values_in(kind)
    if isinstance(value, list):
        if any(map(is_list, alternatives(kind))):
            found = (find_misfit(one, item_of(kind), f"{key}[{number}]") for number, one in enumerate(value))
            return next(filter(None, found), None)
        return (
            f"{key} is a list, not settings by name; {DEFAULT}" if any(map(is_subclasses_disabled, classes)) else None
        )
    if isinstance(value, dict) and values is not None:
        return next(filter(None, (find_misfit(one, values, f"{key}.{name}") for name, one in value.items())), None)
    if isinstance(value, Namespace):
        if str(value.get("class_path", "")).startswith("lit_alignment."):
            given = value.get("init_args")
            hints = arguments_of(import_object(value.class_path))
            return _misfit_in(given, hints, f"{key}.init_args") if isinstance(given, Namespace) else None
        if (only := only_class(classes)) is not None:
            return _misfit_in(value, arguments_of(only), key)
    return None


def find_unusable(value: Any, key: str = "") -> str | None:
    """What is wrong with an infinite number, a NaN, a number that no tensor holds, or a source of nothing; else None.

    Args:
        value: A part of the parsed configuration.
        key: Its key.
    """
    if isinstance(value, Namespace | dict | list):
        named = value if isinstance(value, dict) else vars(value) if isinstance(value, Namespace) else {}
        if {"path", "records"} <= named.keys() and not named["path"] and named["records"] is None:
            return f"{key} has neither 'path' nor 'records'; give one of them."
        pairs: Iterable[tuple[str | int, Any]] = enumerate(value) if isinstance(value, list) else named.items()
        parts = ((_joined(key, name), each) for name, each in pairs)
        return next(filter(None, (find_unusable(each, name) for name, each in parts)), None)
    if isinstance(value, float) and not isfinite(value):
        return f"{key} is {value}; give a finite number."
    over = isinstance(value, int) and abs(value) >= 2**63
    return f"{key} is {value:.3g}, past any count; give a smaller number." if over else None


def _joined(key: str, name: str | int) -> str:
    return f"{key}[{name}]" if isinstance(name, int) else f"{key}.{name}".removeprefix(".")


def _misfit_in(values: Namespace, hints: dict[str, Any], key: str) -> str | None:
    found = (
        find_misfit(values[name], hints[name], f"{key}.{name}")
        for name in vars(values)
        if name in hints.keys() - LINKED
    )
    return next(filter(None, found), None)


def _prefix(key: str, kind: Any) -> str:
    return f"{key}." if only_class([kind]) is not None else f"{key}.init_args."


@cache
def _public() -> dict[Any, str]:
    """Our classes that can be named as `lit_alignment.X`; another library's has a name of its own."""
    package = importlib.import_module("lit_alignment")
    named = ((getattr(package, name), f"lit_alignment.{name}") for name in package.__all__)
    return {kind: name for kind, name in named if getattr(kind, "__module__", "lit_alignment").startswith("lit_")}


def _name(kind: Any) -> str:
    """How a configuration names what takes a key: a class, the Trainer, or nothing but the configuration itself."""
    if kind is None or isinstance(kind, str):
        return kind or "the configuration"
    return "trainer" if kind is Trainer else _public().get(kind) or str(get_import_path(kind))


def _names(classes: list[Any]) -> str:
    return " or ".join(kind.__name__ for kind in classes)


def _unknown(key: str, owner: Any, candidates: Iterable[str], place: str, below: Iterable[str] = ()) -> str:
    names, leaves = sorted(candidates), {path: path.rpartition(".")[2] for path in below}

    def part_of(name: str) -> bool:  # lr, epochs, batch
        return "".join(word[:1] for word in name.split("_")) == key or f"_{name}_".find(f"_{key}_") >= 0

    close = [
        *filter(part_of, names),
        *(path for path, leaf in leaves.items() if leaf == key),
        *(path for path, leaf in leaves.items() if part_of(leaf)),
        *get_close_matches(key, names, n=1, cutoff=0.5),
        *(name for name in names if name.startswith(key)),
    ]
    hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names[:20])}."
    return f"{place}unknown key '{key}' in {_name(owner)}. {hint}"


def _shortened(message: str) -> str:
    """The innermost reason."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Subclass types expect", "- a ", "Parser key")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(noise)] or lines[-1:]
    return " ".join(dict.fromkeys(line if len(line) < 300 else line[:300] + " ..." for line in kept))
