"""Passages of a knowledge base: reading them, and writing them out as text."""

from dataclasses import dataclass

from lit_alignment.data.encoding.messages import read_id, value_kind
from lit_alignment.errors import ConfigError, RecordError


@dataclass
class Passage:
    """A text that can be retrieved.

    Args:
        id: Its own id, or its position in the file.
        title: What it is about; may be empty.
        text: The text.
        where: File and line, for error messages.
    """

    id: str
    title: str = ""
    text: str = ""
    where: str = ""


def read_passage(raw: object, where: str, position: int) -> Passage:
    """One passage `{id?, title?, text}`; a plain string is a text.

    Args:
        raw: The parsed JSON value.
        where: File and line.
        position: Index in the file, the id of a passage that has none.

    Raises:
        RecordError: Naming the field and the fix.
    """
    if isinstance(raw, str):
        raw = {"text": raw}
    if not isinstance(raw, dict):
        raise RecordError(where, "", f"the passage is {value_kind(raw)}", 'Write {"id", "title", "text"}.')
    if "text" not in raw:
        found = ", ".join(f"'{key}'" for key in raw) or "nothing"
        raise RecordError(where, "text", f"is missing (found: {found})", "Give the passage's text.")
    title = raw.get("title") or ""
    for name, value in (("text", raw["text"]), ("title", title)):
        if not isinstance(value, str):
            raise RecordError(where, name, f"is {value_kind(value)}", "Make it a string.")
    if not raw["text"].strip():
        raise RecordError(where, "text", "is empty", "Give the passage a text, or remove it.")
    return Passage(read_id(raw.get("id"), "id", where, position), title, raw["text"], where)


def check_format(name: str, form: str) -> None:
    """Refuse a form of passages that says nothing of the text.

    Raises:
        ConfigError: If `{text}` is missing, or another name stands in braces.
    """
    try:
        filled = form.format(title="", text="TEXT")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{name} is {form!r}; only {{title}} and {{text}} can stand in it.") from error
    if "TEXT" not in filled:
        raise ConfigError(f"{name} is {form!r}; it must hold {{text}}.")


def format_passage(form: str, title: str, text: str) -> str:
    """A passage as a model reads it; one without a title loses what stands before its text.

    Args:
        form: A text with {title} and {text}.
        title: The title, possibly quoted, as data sets of Wikipedia passages have it.
        text: The text.
    """
    text = text.strip().removeprefix('"').removesuffix('"') if text.startswith('"') and text.endswith('"') else text
    title = title.strip().removeprefix('"').removesuffix('"')
    if not title and "{title}" in form:
        start = min(form.index("{title}"), form.index("{text}"))
        form = form[:start] + form[form.index("{text}") :]
    return form.format(title=title, text=text)
