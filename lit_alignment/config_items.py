"""Options that set something of one item of a list, found by the name of its class."""

import json
from difflib import get_close_matches
from typing import Any

import yaml

from lit_alignment.config_files import Layer, node_at, read_layers
from lit_alignment.errors import ConfigError

LISTS = (("trainer", "callbacks"), ("trainer", "logger"), ("trainer", "plugins"))
SPEC = ("class_path", "init_args", "dict_kwargs", "help")


def split_items(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A command line without options such as `--trainer.callbacks.CherryPicks.num_samples 8`; and these, with values.

    Args:
        arguments: The command and its options.

    Raises:
        ConfigError: If a value is missing.
    """
    rest: list[str] = []
    asked: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        name, has_value, value = word.partition("=")
        if not _sets_an_item(name):
            rest.append(word)
            continue
        if not has_value and (value := next(words, None) or "--").startswith("--"):
            raise ConfigError(f"{name} needs a value.")
        asked.append((name, value))
    return rest, asked


def with_items(arguments: list[str], asked: list[tuple[str, str]]) -> list[str]:
    """A command line whose lists have items with other settings.

    A list replaces an earlier one, so the last one is taken, with what is added to it, and given anew at the end.

    Args:
        arguments: The other options.
        asked: Options that set something of one item, with their values.

    Raises:
        ConfigError: If a list has no item of that class, or several.
    """
    layers = read_layers(arguments)
    changed: dict[tuple[str, ...], list[Any]] = {}
    for name, value in asked:
        part, key, *below = name.removeprefix("--").split(".")
        items = changed.setdefault((part, key), _items(layers, (part, key)))
        _set(items, [key, *below], yaml.safe_load(value), name)
    return [*arguments, *(f"--{'.'.join(key)}={json.dumps(items)}" for key, items in changed.items())]


def _sets_an_item(name: str) -> bool:
    parts = name.removeprefix("--").split(".")
    return name.startswith("--") and len(parts) > 3 and tuple(parts[:2]) in LISTS and parts[2] not in SPEC


def _items(layers: list[Layer], key: tuple[str, ...]) -> list[Any]:
    """The items of a list as the parser would have them, each with a `class_path`."""
    items: list[Any] = []
    for layer in layers:
        own = tuple(name.removesuffix("+") for name in layer.keys)
        if key[: len(own)] != own or (node := node_at(layer.root, [*key[len(own) :]])) is None:
            continue
        value = yaml.SafeLoader("").construct_document(node)
        added = value if isinstance(value, list) else [value]
        items = [*items, *added] if layer.keys and layer.keys[-1].endswith("+") else added
    return [{"class_path": item} if isinstance(item, str) else item for item in items if item is not None]


def _set(items: list[Any], key: list[str], value: Any, option: str) -> None:
    """Set what an option asks for.

    Args:
        items: The list.
        key: Its name, the class, and the setting.
        value: The value.
        option: The option, for messages.
    """
    name, kind, *setting = key
    named = [str(item.get("class_path", "")).rpartition(".")[2] if isinstance(item, dict) else "" for item in items]
    if named.count(kind) > 1:
        raise ConfigError(
            f"{option}: trainer.{name} has {named.count(kind)} items of {kind}. Change the list in the file."
        )
    if kind not in named:
        there = f"has {', '.join(filter(None, named))}" if items else "is empty"
        close = get_close_matches(kind, named, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Add it first: --trainer.{name}+=CLASS_PATH"
        raise ConfigError(f"{option}: trainer.{name} {there}, no {kind}. {hint}")
    settings = items[named.index(kind)].setdefault("init_args", {})
    for part in setting[:-1]:
        inner = settings.setdefault(part, {})
        settings = inner.setdefault("init_args", inner) if "class_path" in inner else inner
    settings[setting[-1]] = value
