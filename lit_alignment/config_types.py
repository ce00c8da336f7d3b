"""What the types of settings say: the arguments of a class, and the classes, lists and dictionaries of a type hint."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from jsonargparse._common import is_subclasses_disabled
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch import Trainer

LISTS: tuple[Any, ...] = (list, Iterable, Sequence)


@cache
def arguments_of(kind: Any) -> dict[str, Any]:
    """Names and types of what a class takes, those that it passes on to its bases as `**settings` included."""
    found = get_signature_parameters(kind, None)
    return {each.name: Any if each.annotation is inspect.Parameter.empty else each.annotation for each in found}


def alternatives(hint: Any) -> list[Any]:
    """The types of a union, flat."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [each for part in typing.get_args(hint) for each in alternatives(part)]
    return [hint]


def is_list(hint: Any) -> bool:
    """Whether a type is that of lists."""
    return typing.get_origin(hint) in LISTS


def item_of(hint: Any) -> Any:
    """The type of a list's items."""
    return next((typing.get_args(each)[0] for each in alternatives(hint) if is_list(each)), Any)


def values_in(hint: Any) -> Any:
    """The type of a dictionary's values, if the hint has one."""
    found = (typing.get_args(each) for each in alternatives(hint) if typing.get_origin(each) is dict)
    return next((pair[1] for pair in found), None)


def classes_in(hint: Any) -> list[Any]:
    """The classes among the alternatives whose settings can be given."""
    made = [typing.get_args(each)[1] if is_maker(each) else each for each in alternatives(hint)]
    return [each for each in made if inspect.isclass(each) and _takes_settings(each)]


def is_maker(hint: Any) -> bool:
    """Whether a type is that of functions, for which a class can be given that takes their arguments first."""
    return typing.get_origin(hint) is Callable and isinstance(typing.get_args(hint)[0], list)


def supplied(hint: Any) -> int:
    """How many arguments such a function is given."""
    return next((len(typing.get_args(each)[0]) for each in alternatives(hint) if is_maker(each)), 0)


def _takes_settings(kind: Any) -> bool:
    return bool(is_subclasses_disabled(kind) or ActionTypeHint.is_subclass_typehint(kind))  # type: ignore[no-untyped-call]


def only_class(classes: list[Any]) -> Any:
    """The class that needs no `class_path`: the only one, and without subclasses."""
    return next((kind for kind in classes if is_subclasses_disabled(kind) or kind is Trainer), None)
