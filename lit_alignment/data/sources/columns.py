"""From the columns of tables, or the keys of any records, to the fields that methods read."""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from lit_alignment.errors import ConfigError, RecordError

KnownForm = Literal["alpaca", "hh", "sharegpt", "ultrafeedback"]
Columns = dict[str, str] | KnownForm

FORMS: dict[str, dict[str, str]] = {
    "alpaca": {name: name for name in ("instruction", "input", "output")},
    "hh": {name: name for name in ("chosen", "rejected")},
    "sharegpt": {"conversations": "conversations"},
    "ultrafeedback": {name: name for name in ("prompt", "chosen", "rejected", "messages")},
}
OPTIONAL = {"id", "input", "meta", "system", "tools"}  # fields whose cells may be empty
ANSWERS = {"answer", "chosen", "completion", "label", "output", "rejected"}  # what is known of an answer
QUESTIONS = {"context", "conversations", "instruction", "messages", "prompt", "text"}  # what is asked, or classified
TEXTS = {"input", "instruction", "output", "system", "text"}
CONVERSATIONS = {"answer", "chosen", "completion", "context", "prompt", "rejected"}  # texts, or lists of messages
# Fields that are not always texts: in a table of texts their cells are JSON.
STRUCTURED = {"answers", "candidates", "completions", "conversations", "is_desirable", "label", "labels", "margin"}
STRUCTURED |= {"messages", "meta", "ranking", "rewards", "steps", "tools"}

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
ASSISTANTS = ("bard", "bing", "chatgpt")  # of ShareGPT, besides gpt


@dataclass(frozen=True)
class UnusableRecord:
    """A record that lacks what its source's columns promise: it is dropped, and counted under a reason.

    Args:
        reason: `empty_cell` or `wrong_type`.
        detail: The first of the cells, with its place.
        fields: Fields that lack.
        rest: The fields that are there.
    """

    reason: str
    detail: str
    fields: set[str] = field(default_factory=set)
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def can_be_asked(self) -> bool:
        """Whether all that lacks is what is known of the answer."""
        return self.reason == "empty_cell" and self.fields.isdisjoint(QUESTIONS)


def check_columns(columns: Columns | None, title: str) -> None:
    """Refuse columns that say nothing.

    Args:
        columns: Of a source.
        title: The source's name.

    Raises:
        ConfigError: If a field or its column has no name, or the form is unknown.
    """
    if isinstance(columns, str) and columns not in FORMS:
        raise ConfigError(
            f"source {title}: columns is '{columns}'; use one of {', '.join(FORMS)}, or {{field: column}}."
        )
    if isinstance(columns, dict) and not (columns and all(columns) and all(columns.values())):
        raise ConfigError(f"source {title}: columns is {columns}; write {{field: column}}, as {{prompt: question}}.")


def own_columns(header: Iterable[str]) -> dict[str, str]:
    """A table's columns under their own names."""
    return {name: name for name in header if name}


def check_header(columns: Columns, header: Collection[str], where: str) -> None:
    """Refuse columns that a table has not.

    Args:
        columns: Of its source.
        header: Names of the table's columns.
        where: The table.

    Raises:
        RecordError: Naming the column, those that there are, and the nearest.
    """
    for name in _wanted(columns, header).values():
        _refuse_unknown(name, header, where)


def as_fields(raw: Any, columns: Columns, where: str, header: Collection[str] | None = None) -> Any:
    """The fields of a raw record: cells by name, or texts made of them; other columns are left out.

    Args:
        raw: The record; anything but an object comes back as it is, for its reader to refuse.
        columns: The column, or the text with columns in braces, of each field.
        where: File and line.
        header: Names of a table's columns, which rows need not have all; None takes the record's own keys.

    Returns:
        The record, or an UnusableRecord.

    Raises:
        RecordError: If a record that is no row of a table lacks a column.
    """
    if not isinstance(raw, dict):
        return raw
    known = raw.keys() if header is None else header
    record: dict[str, Any] = {}
    empty: dict[str, str] = {}
    for name, wanted in _wanted(columns, known).items():
        _refuse_unknown(wanted, known, where)
        parts = [wanted] if wanted in known else _named_in(wanted)
        missing = next((part for part in parts if _is_empty(raw.get(part))), None)
        if missing is None:
            record[name] = raw[wanted] if wanted in known else _filled(wanted, raw)
        elif not _may_be_empty(name, wanted):
            empty[name] = missing
    if empty:
        detail = f"{where}: column '{next(iter(empty.values()))}' is empty"
        return UnusableRecord("empty_cell", detail, set(empty), record)
    if wrong := next((name for name, value in record.items() if not _fits(name, value)), None):
        shown = json.dumps(record[wrong], ensure_ascii=False)[:40]
        detail = f"{where}: field '{wrong}' is {shown}, and should be a text"
        if isinstance(record[wrong], int | float):
            detail += f"; write {wrong}: '{{{_wanted(columns, known)[wrong]}}}' for numbers as texts"
        return UnusableRecord("wrong_type", detail, {wrong}, record)
    match columns:
        case "hh":
            return _read_hh(record, where)
        case "sharegpt":
            return _read_sharegpt(record)
    return record


def texts_as_values(record: dict[str, Any]) -> dict[str, Any]:
    """A row of texts, with numbers, truth values and lists where a field may hold them.

    Args:
        record: Fields of a CSV or TSV file.
    """
    return {name: _value(name, cell) for name, cell in record.items()}


def _value(name: str, cell: Any) -> Any:
    if not isinstance(cell, str) or name not in STRUCTURED | CONVERSATIONS:
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return {"True": True, "False": False}.get(cell, cell) if name in STRUCTURED else cell  # as Python writes them
    if name in CONVERSATIONS:  # an answer may be a number, or a list
        is_messages = isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value)
        return value if value and is_messages else cell
    return cell if value is None or isinstance(value, str) else value


def _may_be_empty(name: str, wanted: str) -> bool:
    """Whether a field may lack: one that was not asked for is needed only where a form of records has it."""
    return name in OPTIONAL or (name == wanted and name not in QUESTIONS | ANSWERS)


def _wanted(columns: Columns, known: Collection[str]) -> dict[str, str]:
    """The column of each field; of a form those that may be empty need not be there."""
    if isinstance(columns, dict):
        return columns
    return {name: wanted for name, wanted in FORMS[columns].items() if wanted in known or name not in OPTIONAL}


def _named_in(text: str) -> list[str]:
    """Columns that stand in braces."""
    return [name for name in PLACEHOLDER.findall(text) if name]


def _filled(text: str, raw: dict[str, Any]) -> str:
    def cell(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        value = raw[found[1]]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return PLACEHOLDER.sub(cell, text)


def _refuse_unknown(wanted: str, known: Collection[str], where: str) -> None:
    missing = [wanted] if wanted not in known else []
    if missing and (named := _named_in(wanted)):
        missing = [name for name in named if name not in known]
    if missing:
        near = get_close_matches(missing[0], known, 1)
        fix = f"Did you mean '{near[0]}'? " if near else ""
        listed = ", ".join(f"'{name}'" for name in known) or "none"
        raise RecordError(
            where, "", f"no column is named '{missing[0]}' (there are: {listed})", f"{fix}Set the source's 'columns'."
        )


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _fits(name: str, value: Any) -> bool:
    if name in TEXTS:
        return isinstance(value, str)
    return isinstance(value, str | list | dict) if name in CONVERSATIONS else True


def _read_hh(record: dict[str, Any], where: str) -> dict[str, Any] | UnusableRecord:
    """A pair of Anthropic's HH, whose sides are whole dialogues in one text: the prompt and both last answers."""
    chosen, rejected = (_dialogue(record[side]) for side in ("chosen", "rejected"))
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        detail = f"{where}: 'chosen' and 'rejected' are no dialogues that differ in the last answer alone"
        return UnusableRecord("wrong_type", detail, {"chosen", "rejected"})
    if not (chosen[-1]["content"] and rejected[-1]["content"]):
        return UnusableRecord("empty_cell", f"{where}: the last answer is empty", {"chosen", "rejected"})
    answers = {"chosen": chosen[-1:], "rejected": rejected[-1:], "completion": chosen[-1:]}
    return {"prompt": chosen[:-1], **answers}


def _dialogue(text: str) -> list[dict[str, str]]:
    """The messages of a dialogue that ends with the assistant; none if it is not one."""
    begin, *parts = TURN.split(text)
    roles, contents = parts[::2], parts[1::2]
    if begin.strip() or len(roles) < 2 or roles[-1] != "Assistant":
        return []
    return [{"role": HH_ROLES[r], "content": c.strip()} for r, c in zip(roles, contents, strict=True)]


def _read_sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    """Conversations whose assistants have names of their own."""
    messages: Iterable[Any] = record["conversations"]
    renamed = [
        {**message, "from": "gpt"} if isinstance(message, dict) and message.get("from") in ASSISTANTS else message
        for message in messages
    ]
    return {"conversations": renamed}
