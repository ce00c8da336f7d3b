"""Configuration files, read before the parser sees them: a wrong file is one message, and each key has its line."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_alignment.errors import ConfigError
from lit_alignment.paths import recipes_dir

MAX_BYTES = 2**23
MAX_NODES = 200_000  # of a file whose anchors are written out
RECORDS = (".jsonl", ".parquet", ".csv", ".tsv", ".arrow")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PLAIN = "tag:yaml.org,2002:"
TAGS = {f"{PLAIN}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")}


@dataclass(frozen=True)
class Layer:
    """Settings of one file, or of one option of the command line; later layers win.

    Args:
        file: The file; "" for an option.
        root: Its settings.
        keys: Where in the configuration they belong; empty for the whole of it.
    """

    file: str
    root: yaml.Node
    keys: tuple[str, ...] = ()


def read_layers(arguments: list[str]) -> list[Layer]:
    """The settings of a command line, in the order in which they are applied.

    Raises:
        ConfigError: If a file cannot be read as a configuration; its content is not repeated.
    """
    layers = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        if name in ("config", "c"):
            value = value if has_value else next(words, "")
            layers.append(Layer(value, read_file(value)))
        elif not (name in ("help", "h", "print_config") or name.endswith(".help")):
            value = value if has_value else next(words, "")
            layers.append(Layer("", _option_value(value), tuple(name.split("."))))
    return layers


def read_file(path: str) -> yaml.MappingNode:
    """The settings of a file.

    Raises:
        ConfigError: If it is missing, no YAML or JSON, or holds no settings by name.
    """
    file = Path(path).expanduser()
    if not path:
        raise ConfigError("--config needs a file, such as `lit-alignment init sft` writes.")
    if not file.exists():
        raise ConfigError(f"{path}: no such file (looked from {Path.cwd()}). {_recipe_hint(path)}")
    if not file.is_file():
        raise ConfigError(f"{path}: a folder, not a file. Give one of the files in it to --config.")
    if file.suffix in RECORDS:
        raise ConfigError(f"{path}: a file of records, no configuration. Give it as data.init_args.train: [path: ...].")
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: over {MAX_BYTES // 2**20} MiB, too large for a configuration. Check --config.")
    try:
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=LOADER)
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigError(f"{path}: no text, so no configuration. Check --config.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}:{_position(mark)}: no valid YAML: {error.problem}. Correct the file.") from error
    if root is None:
        raise ConfigError(f"{path}: the file is empty. Give a configuration to --config.")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: {described(root)}, not settings by name. Give a configuration to --config.")
    _check(root, path)
    return root


def _recipe_hint(path: str) -> str:
    """How a recipe comes to where a command looks for it, outside of a checkout."""
    name = path.removeprefix("configs/")
    if name == path or not (recipes_dir() / name).is_file():
        return "Check --config."
    return f"It is a recipe: lit-alignment init --recipe {name.removesuffix('.yaml')} writes it, with what it names."


def described(node: yaml.Node) -> str:
    """What a part is, without its content."""
    kinds: dict[type[yaml.Node], str] = {yaml.MappingNode: "settings by name", yaml.SequenceNode: "a list"}
    return kinds.get(type(node), "a text")


def settings(node: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Keys of a mapping, each with its node and its value; what is merged into it (`<<`) included."""
    own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag == f"{PLAIN}merge":
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                merged |= settings(each)
        else:
            own[str(key.value)] = (key, value)
    return merged | own


def line_of(node: yaml.Node, layer: Layer) -> str:
    """`file:line: ` of a node, or nothing for the command line."""
    return f"{layer.file}:{node.start_mark.line + 1}: " if layer.file else ""


def locate(layers: list[Layer], key: str) -> tuple[str, str]:
    """`file:line: ` and the value of a key, as the last layer has it that sets it; each may be empty."""
    if (found := find_node(layers, key)) is None:
        return "", ""
    layer, node = found
    text = str(node.value)
    short = text if len(text) <= 60 else f"{text[:60]}..."
    shown = repr(short) if node.tag.endswith(":str") else short
    return line_of(node, layer), shown if isinstance(node, yaml.ScalarNode) else described(node)


def find_node(layers: list[Layer], key: str) -> tuple[Layer, yaml.Node] | None:
    """The value of a key, and the last layer that sets it."""
    names = [name for name in re.split(r"[.\[\]]+", key) if name and name != "init_args"]
    for layer in reversed(layers):
        own = [name.removesuffix("+") for name in layer.keys if name != "init_args"]
        if names[: len(own)] == own and (node := node_at(layer.root, names[len(own) :])) is not None:
            return layer, node
    return None


def node_at(node: yaml.Node, names: list[str]) -> yaml.Node | None:
    """What is under these names, through `init_args`; in a list without a number the first that has it."""
    if not names:
        return node
    if isinstance(node, yaml.SequenceNode):
        items = [node.value[int(names[0])]] if names[0].isdigit() else node.value
        rest = names[1:] if names[0].isdigit() else names
        return next((found for item in items if (found := node_at(item, rest)) is not None), None)
    keys = settings(node)
    keys |= settings(keys["init_args"][1]) if "init_args" in keys else {}
    return node_at(keys[names[0]][1], names[1:]) if names[0] in keys else None


def placed(message: str, layers: list[Layer]) -> str:
    """A message behind the file and the line of the setting with which it begins, if it does with one."""
    key = re.match(r"[\w.\[\]]+(?=[ :])", message)
    places = (locate(layers, f"{part}{key[0]}")[0] for part in ("", "model.", "data.")) if key else ()
    return f"{next(filter(None, places), '')}{message}"


def _option_value(text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=LOADER)
    except yaml.YAMLError:
        node = None  # a plain text, such as `*`
    return node or yaml.ScalarNode(f"{PLAIN}str", text)


def _position(mark: Any) -> str:
    return "1" if mark is None else f"{mark.line + 1}:{mark.column + 1}"


def _check(root: yaml.Node, path: str) -> None:
    """Refuse tags, keys that stand twice, and anchors that write out to more than anyone can read."""
    sizes: dict[int, int] = {}
    # A node is met twice: on the way down its parts are put on the stack, on the way up it is counted.
    stack, above = [(root, False)], set[int]()
    while stack:
        node, counted = stack.pop()
        if counted:
            above.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in _parts(node))
            if sizes[id(node)] > MAX_NODES:
                raise ConfigError(
                    f"{path}:{_position(node.start_mark)}: anchors that write out to over {MAX_NODES} values. "
                    "Write a smaller configuration."
                )
        elif id(node) not in sizes:
            _check_node(node, path)
            if id(node) in above:
                raise ConfigError(f"{path}:{_position(node.start_mark)}: an anchor that holds itself. Remove it.")
            above.add(id(node))
            stack.append((node, True))
            stack += [(part, False) for part in _parts(node)]


def _check_node(node: yaml.Node, path: str) -> None:
    if node.tag not in TAGS:
        raise ConfigError(f"{path}:{_position(node.start_mark)}: the tag {node.tag} is not allowed. Remove it.")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != f"{PLAIN}merge":
                first = seen[name].start_mark.line + 1
                raise ConfigError(
                    f"{path}:{_position(key.start_mark)}: '{name}' stands twice, first in line {first}. Remove one."
                )
            seen[name] = key


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
