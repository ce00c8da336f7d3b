"""Which class a record's label names."""

from collections.abc import Sequence


def class_index(label: object, labels: Sequence[str]) -> int | None:
    """Position of the class that a label names, or None if it is none of them.

    A number or truth value is the class of that name, where one is named so (stars from "1" to "5"), else a whole
    number is an index.

    Args:
        label: A name, a number or a truth value, as a record holds it.
        labels: Names of the classes.
    """
    for name in _names_of(label):
        if name in labels:
            return labels.index(name)
    match label:
        case bool():
            return None
        case int() | float() if 0 <= label < len(labels) and label == int(label):
            return int(label)
    return None


def _names_of(label: object) -> list[str]:
    """How a label may be named: a number as it is written, also as a whole one, and a truth value in either case."""
    match label:
        case str():
            return [label]
        case bool():
            return [str(label), str(label).lower()]
        case int():
            return [str(label)]
        case float():
            return [str(label), *([f"{label:.0f}"] if label.is_integer() else [])]
    return []
