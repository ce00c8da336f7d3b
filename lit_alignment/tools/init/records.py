"""What a file of records holds: whether it fits a method, and what of it belongs into a configuration."""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from lit_alignment.data.encoding.feedback import RESPONSES, read_feedback
from lit_alignment.data.encoding.messages import Record, read_record, value_kind
from lit_alignment.data.multimodal.media import read_media_messages
from lit_alignment.data.passages import PassageSourceConfig, read_passage
from lit_alignment.data.sources.columns import UnusableRecord
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError

MOST = 2000  # records that are looked at
MOST_LABELS = 100
# Fields of the forms of records, which `--columns` may name beside those that are asked for.
FORMS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "system", "label", "id")

# Names of columns that say what they hold, by the field that a method reads; the likelier first.
ASKED = ("prompt", "question", "query", "instruction", "input")
ANSWERED = ("completion", "answer", "response", "output")
TEXTS = ("text", "sentence", "review", "comment", "content", "message", *ASKED)
LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "rating", "stars")
PREFERRED = ("chosen", "preferred", "better")
REFUSED = ("rejected", "dispreferred", "worse")
PAIR = {"prompt": ASKED, "chosen": PREFERRED, "rejected": REFUSED}
COLUMNS = {
    "sft": {"prompt": ASKED, "completion": ANSWERED},
    "rag": {"prompt": ASKED, "completion": ANSWERED},
    "distillation": {"prompt": ASKED, "completion": ANSWERED},
    "policy": {"prompt": ASKED, "label": ANSWERED},
    "reward": PAIR,
    "preference": PAIR,
    "classification": {"text": TEXTS, "label": LABELS},
}


@dataclass
class Records:
    """What was found in the first records.

    Args:
        number: How many they are, at most MOST.
        columns: The column of each field, where the records have other names.
        labels: Labels by name, where a record has one or a list of them, in order.
        problem: Of a classifier: `single_label`, `multi_label` or `regression`.
        alone: Whether each holds one response, judged alone.
    """

    number: int = 0
    columns: dict[str, str] | None = None
    labels: list[str] = field(default_factory=list)
    problem: str = "single_label"
    alone: bool = False

    @property
    def kind(self) -> str:
        """What each record holds, in words."""
        if self.alone:
            return "one response, judged alone"
        if self.problem == "single_label":
            return "one label each" if self.labels else "responses to compare"
        return "a list of labels" if self.problem == "multi_label" else "a score"


def look(path: str, method: str, columns: dict[str, str] | None = None) -> Records:
    """Read the first records of a source as a method would.

    Args:
        path: A file, a folder, or the name of a data set on the hub.
        method: One of READERS.
        columns: The column of each field; None looks for usual names.

    Raises:
        RecordError: At the first record that cannot be used.
        ConfigError: If the first one fits other methods, which are named; or its columns have no usual names; or there
            is none.
    """
    first = next((raw for _, raw in SourceConfig(path).read() if isinstance(raw, dict)), None)
    if columns is None and first is not None and not _fits(method, first):
        columns = _columns(method, first)
    found, read = [], READERS[method]
    for position, (where, raw) in enumerate(islice(SourceConfig(path, columns=columns).read(), MOST)):
        if isinstance(raw, UnusableRecord):  # counted when it is trained
            continue
        try:
            found.append(read(raw, where, position))
        except RecordError as error:
            others = [name for name in READERS if _fits(name, raw)] if not found and columns is None else []
            if not others and not found and columns is not None and (named := _misnamed(method, columns)):
                raise ConfigError(f"{where}: {named}") from error
            if not others:
                if found or columns is not None or not _unnamed(method, raw):
                    raise
                raise ConfigError(f"{where}: {_unusual(method, raw)}") from error
            raise ConfigError(f"{error} As it is, it fits lit-alignment init {' or '.join(others[:3])}.") from error
    if not found:
        raise ConfigError(f"{path}: no record. Give a file of records.")
    labels = [each.label for each in found] if method == "classification" else []
    alone = method == "preference" and found[0].alone
    return Records(len(found), columns, *_classes(labels, path), alone)


def look_alike(path: str, method: str, trained: Records, columns: dict[str, str] | None = None) -> Records:
    """Read the first records that validate, which hold the same as those that are trained.

    Args:
        path: As of `look`.
        method: One of READERS.
        trained: What is trained.
        columns: As of `look`.

    Returns:
        What was found, with the labels of both.

    Raises:
        RecordError: As of `look`.
        ConfigError: As of `look`; or if they hold labels or responses of another kind.
    """
    found = look(path, method, columns)
    if found.kind != trained.kind:
        raise ConfigError(
            f"{path}: the records hold {found.kind}, and those of --data {trained.kind}. Make both alike."
        )
    return replace(found, labels=sorted({*found.labels, *trained.labels}, key=_natural))


def look_at_passages(path: str) -> str:
    """How many files of text a folder holds; "" of records, of which the first are read.

    Args:
        path: As of a source of passages.

    Raises:
        RecordError: At the first passage that cannot be used, or if a file is no text.
        ConfigError: If there is none.
    """
    source = PassageSourceConfig(path)
    position = -1
    for position, (where, raw) in enumerate(islice(source.read(), MOST)):
        read_passage(raw, where, position)
    if position < 0:
        raise ConfigError(f"{path}: no passage. Give a folder of text, or a file of records {{title?, text}}.")
    found = source.texts()
    return "" if found is None else found.line()


def _columns(method: str, raw: dict[str, Any]) -> dict[str, str] | None:
    """The column of each field that a method reads, by usual names; None where one is not there, or they do not fit."""
    names = {
        wanted: next((name for name in usual if name in raw), "") for wanted, usual in COLUMNS.get(method, {}).items()
    }
    fits = bool(names) and all(names.values()) and _fits(method, {wanted: raw[name] for wanted, name in names.items()})
    return names if fits else None


def _unnamed(method: str, raw: Any) -> bool:
    """Whether a record is a row of a table, in which the method's fields have other names."""
    flat = isinstance(raw, dict) and not any(isinstance(value, list | dict) for value in raw.values())
    # A row of one column is no table; of two it may be one where a pair holds its prompt, or lacks a column.
    return flat and method in COLUMNS and len(raw) >= 2 and not COLUMNS[method].keys() <= raw.keys()


def _unusual(method: str, raw: dict[str, Any]) -> str:
    """Which columns there are, and how to say what they hold."""
    listed = ", ".join(f"'{name}'" for name in raw)
    asked = " ".join(f"{name}={name if name in raw else 'COLUMN'}" for name in COLUMNS[method])
    alone = (
        "; of responses judged alone: prompt=COLUMN completion=COLUMN label=COLUMN" if method == "preference" else ""
    )
    fields = _quoted(COLUMNS[method])
    return (
        f"no columns of usual names for {fields} (there are: {listed}). Say which hold them: --columns {asked}{alone}"
    )


def _misnamed(method: str, columns: dict[str, str]) -> str:
    """What to say of `--columns` with other names than those of a method's fields; "" where they are not the matter."""
    usual = COLUMNS.get(method, {})
    compared = ("context", *RESPONSES) if usual is PAIR else ()
    unknown = [name for name in columns if name not in (*usual, *FORMS, *compared)]
    if not unknown or usual.keys() <= columns.keys():
        return ""
    meant = {
        field: next((columns[name] for name in (field, *names) if name in columns), "COLUMN")
        for field, names in usual.items()
    }
    asked = " ".join(shlex.quote(f"{field}={column}") for field, column in meant.items())
    return f"--columns names {_quoted(unknown)}, and {method} reads {_quoted(usual)}. Write --columns {asked}"


def _quoted(names: Iterable[str]) -> str:
    """Names in a sentence."""
    *first, last = (f"'{name}'" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _classes(labels: list[Any], path: str) -> tuple[list[str], str]:
    """The classes of labels, and which problem these are.

    Raises:
        ConfigError: If there are more than a classifier has.
    """
    if any(isinstance(label, float) and label != int(label) for label in labels):
        return ["score"], "regression"
    names = dict.fromkeys(str(name) for label in labels for name in (label if isinstance(label, list) else [label]))
    if len(names) > MOST_LABELS:
        raise ConfigError(f"{path}: {len(names)} different labels, more than {MOST_LABELS}. Check the field 'label'.")
    return sorted(names, key=_natural), "multi_label" if labels and isinstance(labels[0], list) else "single_label"


def _fits(method: str, raw: Any) -> bool:
    try:
        READERS[method](raw, "", 0)
    except RecordError:
        return False
    return True


def _answered(raw: Any, where: str, position: int, read: Callable[..., Record] = read_record) -> Record:
    """A conversation with a response to learn from."""
    record = read(raw, where, position)
    if not any(message["role"] == "assistant" for message in record.messages):
        raise RecordError(
            where, "messages", "has no message of the assistant", "Add the response that is to be learned."
        )
    return record


def _labelled(raw: Any, where: str, position: int) -> Record:
    if isinstance(raw, dict) and "text" in raw and "messages" not in raw:
        raw = {**raw, "messages": [{"role": "user", "content": raw["text"]}]}
    record = read_record(raw, where, position)
    if record.label is None:
        raise RecordError(where, "label", "is missing", "Give the name of the class.")
    if isinstance(record.label, dict):
        raise RecordError(where, "label", f"is {value_kind(record.label)}", "Give the name of the class.")
    return record


def _compared(raw: Any, where: str, position: int) -> Record:
    record = read_feedback(raw, where, position)
    if record.alone or (not record.steps and len(record.responses) < 2):
        fix = "Give 'chosen' and 'rejected'; or judge single responses with init preference."
        raise RecordError(where, "", "has one response alone", fix)
    return record


def _judged(raw: Any, where: str, position: int) -> Record:
    record = read_feedback(raw, where, position)
    if not record.steps and all(response["score"] is None for response in record.responses):
        raise RecordError(where, "label", "is missing", "Give 'chosen' and 'rejected', or a label of one response.")
    return record


def _asked(raw: Any, where: str, position: int) -> Record:
    """A prompt, with or without its response."""
    alone: dict[str, Any] = {"completion": []} if isinstance(raw, dict) and "prompt" in raw else {}
    return read_record({**alone, **raw} if isinstance(raw, dict) else raw, where, position)


def _seen(raw: Any, where: str, position: int) -> Record:
    read = partial(read_media_messages, tokens={"image": "<image>"})
    record = _answered(raw, where, position, partial(read_record, read=read))
    if not any(message.get("images") for message in record.messages):
        raise RecordError(where, "images", "is missing", "Give a picture in a message, or beside the messages.")
    return record


# How each method reads a record; the more particular first.
READERS: dict[str, Callable[[Any, str, int], Any]] = {
    "vlm": _seen,
    "reward": _compared,
    "preference": _judged,
    "classification": _labelled,
    "sft": _answered,
    "rag": _answered,
    "distillation": _asked,
    "policy": _asked,
}


def _natural(name: str) -> tuple[bool, float, str]:
    """Whole numbers by their size, before all other names."""
    number = name.removeprefix("-").isdecimal()
    return not number, float(name) if number else 0.0, name
