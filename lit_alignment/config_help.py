"""Settings as people look them up: name, type, default and meaning, from signatures and docstrings."""

import dataclasses
import importlib
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pydoc import locate
from typing import Any

from jsonargparse._common import is_subclasses_disabled
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._typehints import get_all_subclass_paths

from lit_alignment.config_types import alternatives, classes_in, is_list, is_maker, item_of, only_class, values_in
from lit_alignment.errors import ConfigError

REQUIRED = inspect.Parameter.empty
LINKED = {"tokenizer", "labels", "problem", "media"}  # what the module tells the data module
NUM_CLASSES = 12  # that a setting lists

COMMON = {
    "--config FILE": "a configuration in YAML or JSON; several are merged, and later ones win",
    "--KEY VALUE": "a setting in place of the file's, such as --model.optimizer.learning_rate 1e-4, without init_args",
    "--trainer.callbacks.CLASS.SETTING VALUE": "a setting of the one callback of this class in the list, such as "
    "--trainer.callbacks.CherryPicks.num_samples 8; likewise of a logger or a plugin",
    "--seed_everything N": "seed of all random numbers (default: 0)",
    "--print_config": "print the whole configuration as YAML, and end",
    "--ckpt_path PATH": "a checkpoint, or `newest` of this configuration's runs",
}
OF_COMMAND = {
    "fit": {
        "--ckpt_path PATH": "resume from a checkpoint: its path, its URL, or `newest` of this configuration's runs"
    },
    "predict": {
        "--engine ENGINE": "transformers (default), or vllm, which answers all prompts as one stream",
        "--vllm.NAME VALUE": "an argument of vLLM's engine, by the name of its EngineArgs",
    },
}


@dataclass(frozen=True)
class Setting:
    """One setting of a class.

    Args:
        key: Its key below that of the class.
        kind: Its type in words.
        default: Its default as YAML has it; None if it has to be given.
        text: What it does.
        inner: Settings of the class that it is given by, if there is only one.
    """

    key: str
    kind: str
    default: str | None
    text: str
    inner: tuple["Setting", ...] = ()


def settings_of(kind: Any, above: Sequence[Any] = ()) -> tuple[Setting, ...]:
    """The settings of a class, those of its base classes that it passes on included.

    Args:
        kind: The class.
        above: Classes whose settings these are a part of.
    """
    found = []
    fields = {each.name: each for each in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    for each in get_signature_parameters(kind, None):
        if each.name in LINKED and not dataclasses.is_dataclass(kind):
            continue
        inner = _inner(each.annotation)
        nested = settings_of(inner, [*above, kind]) if inner is not None and inner not in [*above, kind] else ()
        value = each.default
        own = fields.get(each.name)
        if own is not None and own.default_factory is not dataclasses.MISSING:
            value = own.default_factory()
        default = None if value is REQUIRED else _default(value)
        text = each.doc or (own.metadata.get("help") if own is not None else None)  # the latter is peft's way
        found.append(Setting(each.name, type_name(each.annotation), default, _sentence(text), nested))
    return tuple(found)


def type_name(hint: Any) -> str:
    """A type in words: `int or null`, `list of SourceConfig`, `a, b or c`."""
    names: dict[str, None] = {}
    for each in alternatives(hint):
        origin, arguments = typing.get_origin(each), typing.get_args(each)
        if each is type(None):
            names["null"] = None
        elif origin is typing.Literal:
            names |= dict.fromkeys(map(str, arguments))
        elif is_list(each):
            names[f"list of {type_name(arguments[0])}"] = None
        elif origin is dict:
            names[f"{type_name(arguments[1])} by name"] = None
        elif origin is tuple:
            names[f"list of {len(arguments)} {type_name(arguments[0])}"] = None
        elif is_maker(each):
            names[f"{type_name(arguments[-1])} by class_path"] = None
        elif each is Any or each is REQUIRED:
            names["anything"] = None
        else:
            names[getattr(each, "__name__", str(each))] = None
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _inner(hint: Any) -> Any:
    """The class whose settings a setting holds, if there is only one, with no `class_path`."""
    value = values_in(hint)
    for each in (hint, item_of(hint), value):
        if each is not None and each is not Any and (only := only_class(classes_in(each))) is not None:
            return only
    return None


def _default(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "its defaults"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, types.FunctionType | type):
        return value.__name__
    return "[]" if value == () else str(value) or '""'


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def lines_of(settings: Sequence[Setting], prefix: str, width: int) -> Iterator[str]:
    """The settings, each with its whole key, as lines of text.

    Args:
        settings: The settings.
        prefix: What stands before each key.
        width: Columns of the terminal.
    """
    for each in settings:
        default = "required" if each.default is None else f"default: {each.default}"
        yield f"  {prefix}{each.key}  {each.kind}" + ("" if each.default == "its defaults" else f"  ({default})")
        yield from textwrap.wrap(each.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        several = "[]" if each.kind.startswith("list of") else ".NAME" if " by name" in each.kind else ""
        yield from lines_of(each.inner, f"{prefix}{each.key}{several}.", width)


def first_line(kind: Any) -> str:
    """What a class says of itself in one line."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def public_classes() -> dict[str, Any]:
    """The package's public classes by name."""
    package = importlib.import_module("lit_alignment")
    named = {name: getattr(package, name) for name in package.__all__}
    return {name: each for name, each in named.items() if isinstance(each, type)}


def command_help(command: str, classes: dict[str, Any]) -> str:
    """What `COMMAND --help` prints: its options, the settings of the configured method, or the methods there are.

    Args:
        command: fit, validate, test or predict.
        classes: Classes of a given configuration by key; `model` and `data` decide what is shown.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [f"usage: lit-alignment {command} --config FILE [--KEY VALUE ...]", ""]
    for name, text in (COMMON | OF_COMMAND.get(command, {})).items():
        lines += [f"  {name}", *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    lines.append("")
    parts = {part: classes[part] for part in ("model", "data") if part in classes}
    for part, kind in parts.items():
        lines += [f"{part}: {kind.__name__}. {first_line(kind)}"]
        lines += [*lines_of(settings_of(kind), f"--{part}.", width), ""]
    if not parts:
        lines += [*_methods(), ""]
    lines += [
        "more:",
        f"  lit-alignment {command} --config FILE --help   the settings of the file's method",
        f"  lit-alignment {command} --help CLASS           those of a class: SFTModule, LoraConfig, CherryPicks, ...",
        f"  lit-alignment {command} --help trainer         those of Lightning's Trainer",
    ]
    return "\n".join(lines)


def _methods() -> Iterator[str]:
    """Each module with its data, and the other classes that a configuration can name."""
    public = public_classes()
    yield "methods (model.class_path, and data.class_path below it):"
    for name, kind in public.items():
        if name.endswith("Module") and not name.endswith("DataModule"):
            yield f"  lit_alignment.{name}: {first_line(kind)}"
            yield f"      {' or '.join(f'lit_alignment.{each.__name__}' for each in kind.data_classes)}"
    rest = [name for name in public if not name.endswith(("Module", "Config"))]
    yield ""
    yield "callbacks, strategies and others of ours (under trainer):"
    yield from (f"  lit_alignment.{name}: {first_line(public[name])}" for name in rest)


def class_help(name: str) -> str:
    """The settings of a class.

    Args:
        name: Of a public class of ours, of one of peft's or Lightning's, or a whole path.

    Raises:
        ConfigError: If there is none, with the nearest one.
    """
    known = known_classes()
    kind = known.get(name.rpartition(".")[2]) if "." not in name or name.startswith("lit_alignment.") else None
    kind = kind or (locate(name) if "." in name else None)
    if not isinstance(kind, type):
        by_case = {each.lower(): each for each in known}
        close = get_close_matches(name.rpartition(".")[2].lower(), by_case, n=1)
        hint = f"Did you mean '{by_case[close[0]]}'?" if close else f"Known: trainer, {', '.join(sorted(known)[:20])}."
        raise ConfigError(f"--help {name}: no such class. {hint}")
    width = min(shutil.get_terminal_size().columns, 120)
    root = kind.__module__.partition(".")[0]
    short = f"{root}.{kind.__name__}"
    path = short if locate(short) is kind else f"{kind.__module__}.{kind.__name__}"
    lines = [f"{path}: {first_line(kind)}", *lines_of(settings_of(kind), "", width)]
    if not is_subclasses_disabled(kind) and (below := [each for each in known.values() if kind in each.__mro__[1:]]):
        names = sorted(each.__name__ for each in below)
        lines += ["", f"kinds of it: {', '.join(names)}"]
    return "\n".join(lines)


def known_classes() -> dict[str, Any]:
    """Classes that a configuration can name, by their short names: ours, peft's, and Lightning's."""
    from lightning.pytorch import callbacks, loggers, strategies
    from peft import PeftConfig

    found: dict[str, Any] = {}
    for module in (strategies, loggers, callbacks):
        found |= {name: each for name, each in vars(module).items() if isinstance(each, type) and name[0].isupper()}
    paths = get_all_subclass_paths(PeftConfig)
    found |= {path.rpartition(".")[2]: locate(path) for path in paths if path.startswith("peft.")}
    return found | public_classes()
