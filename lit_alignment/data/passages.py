"""Passages of a knowledge base: where they come from, reading them, and writing them out as text."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_alignment.data.encoding.messages import read_id, value_kind
from lit_alignment.data.sources.readers import READERS, kind_of, text_lines
from lit_alignment.data.sources.records import SourceConfig, is_data_set
from lit_alignment.data.sources.text_files import MARKDOWN_SUFFIXES, TEXT_SUFFIXES, TextFiles, text_files
from lit_alignment.data.sources.text_passages import split_text
from lit_alignment.errors import ConfigError, RecordError

BESIDE_RECORDS = ("readme", "license", "notice")  # files of text that are no passages where there are records


@dataclass(frozen=True)
class PassageSourceConfig(SourceConfig):
    """Where passages come from: records {id?, title?, text}, or files of text.

    A folder of text (.md, .markdown, .rst, .text and .txt files, at any depth), or one such file, is cut into passages
    at headings, then between paragraphs, and inside a paragraph only where it is too long, between its sentences. The
    title of a passage is the file's path in the folder and the headings above it, and its id that path and a number:
    `guide/setup.md#3`. Order and ids depend on the files alone.

    Args:
        max_words: Words of a passage at most, where files of text are cut. DPR's passages have 100 (Karpukhin et al.
            2020, arXiv:2004.04906): with a title about 150 tokens of English prose, up to 250 of code and tables.
        suffixes: Ends of the names of files that are text, in place of those above; a folder is then one of text
            whatever else is there.
        name: The name in reports; of files of text it also stands before ids and titles, so that two folders may hold
            files of the same name.
    """

    max_words: int = 100
    suffixes: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse settings that no text can be cut by."""
        super().__post_init__()
        if self.max_words < 1:
            raise ConfigError(f"source {self.title}: max_words is {self.max_words}; use 1 or more.")
        wrong = [each for each in self.suffixes or [] if not each.startswith(".") or each in READERS]
        if wrong or self.suffixes == []:
            raise ConfigError(
                f"source {self.title}: suffixes are {self.suffixes}; write ends of names of text files, as [.md, .txt]."
            )

    def texts(self) -> TextFiles | None:
        """The files of text behind `path`; None where it names records.

        Raises:
            ConfigError: If a folder holds both records and text, or no file that is either.
            RecordError: If a file cannot be read.
        """
        path = Path(os.path.expanduser(self.path or ""))
        suffixes = [suffix.lower() for suffix in self.suffixes or TEXT_SUFFIXES]
        if self.path is not None and os.path.isfile(path):
            return text_files(path, suffixes) if path.suffix.lower() in suffixes else None
        if self.path is None or not os.path.isdir(path):
            return None
        if self.suffixes is None and is_data_set(path, self.subset, self.split):
            return None
        found = text_files(path, suffixes)
        if self.suffixes is None and self._holds_records(path, found):
            return None
        if not found.files:
            raise ConfigError(
                f"{path}: {found.line()}. Give a folder with files of text ({', '.join(suffixes)}) or of records "
                f"({', '.join(READERS)}), or the source's 'suffixes'."
            )
        return found

    def _holds_records(self, path: Path, found: TextFiles) -> bool:
        """Whether a folder is one of records, beside which a README may be."""
        records = sorted(file.name for file in path.iterdir() if kind_of(file) in READERS and file.is_file())
        texts = [found.name_of(file) for file in found.files if file.stem.lower() not in BESIDE_RECORDS]
        if records and texts:
            raise ConfigError(
                f"{path}: holds records ({_some(records)}) and text ({_some(texts)}). Say which are the passages: "
                f"path: {path / records[0]}, or suffixes: [{Path(texts[0]).suffix}] for the text alone."
            )
        return bool(records) or (not texts and (path / "data").is_dir())

    def files(self) -> list[Path]:
        """The local files behind `path`, of text or of records; none for inline records and hub names."""
        found = self.texts()
        return super().files() if found is None else found.files

    def read(self, streaming: bool = False) -> Iterator[tuple[str, Any]]:
        """Yield (where, raw passage) for each in order, with no more than one file of text in memory.

        Args:
            streaming: As of SourceConfig.

        Raises:
            RecordError: If a file cannot be read.
        """
        found = self.texts()
        if found is None:
            yield from super().read(streaming)
            return
        if self.columns is not None:
            raise ConfigError(f"source {self.title}: {self.path} holds text, which has no columns. Remove 'columns'.")
        for file in found.files:
            name = f"{self.name}/{found.name_of(file)}" if self.name else found.name_of(file)
            markdown = file.suffix.lower() in MARKDOWN_SUFFIXES
            parts = split_text(text_lines(file, self.limits), self.max_words, markdown)
            for number, part in enumerate(parts, start=1):
                title = f"{name}: {part.heading}" if part.heading else name
                yield f"{file}:{part.line}", {"id": f"{name}#{number}", "title": title, "text": part.text}


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


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
