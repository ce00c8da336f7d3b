"""`lit-alignment convert`: a JSON configuration of turbo-alignment as one of ours."""

import sys
from pathlib import Path

from lit_alignment.errors import ConfigError
from lit_alignment.files import replaced
from lit_alignment.tools import parsers
from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.kinds import CONVERTERS, SHORT, kind_of
from lit_alignment.tools.convert.settings import Notes, Settings, read_json


def main(arguments: list[str]) -> None:
    """Write our configuration beside the old one, and say what to know about it.

    Raises:
        ConfigError: If the file is no configuration, lacks a setting, or is of a kind that is not converted.
    """
    options = parsers.convert().parse_args(arguments)
    top = Settings(read_json(options.config), "", Notes())
    documents = convert(top, SHORT.get(options.kind, options.kind) or kind_of(top.values, options.config))
    notes = top.notes
    if notes.missing:
        raise ConfigError(f"{options.config}: missing: {', '.join(dict.fromkeys(notes.missing))}.")
    notes.unknown += top.unread()
    targets = _targets(options.out or options.config.with_suffix(documents[0].suffix), documents)
    taken = [str(target) for target in targets if target.exists()]
    if taken and not options.overwrite:
        raise ConfigError(f"{', '.join(taken)} exists. Choose another --out, or add --overwrite.")
    for document, target in zip(documents, targets, strict=True):
        try:
            with replaced(target) as file:
                file.write(document.text(target, options.config, notes))
        except OSError as error:
            raise ConfigError(f"{target} cannot be written ({error.strerror}). Choose another --out.") from error
    for title, lines in zip(("warning", "not carried over", "unknown key"), notes.groups(), strict=True):
        sys.stderr.writelines(f"{title}: {line}\n" for line in lines)
    for document, target in zip(documents, targets, strict=True):
        print(f"{target} is written. Run: {document.how_to_run(target)}")


def convert(top: Settings, kind: str) -> list[Document]:
    """Our documents for an old configuration that the old command `kind` takes; the notes of `top` are filled."""
    return CONVERTERS[kind](top)


def _targets(first: Path, documents: list[Document]) -> list[Path]:
    """Where to write: one file, files that differ in their endings, or files with a number each."""
    endings = [document.suffix for document in documents]
    numbered = len(set(endings)) < len(endings)
    several = [first.with_suffix(f".{index}{each}" if numbered else each) for index, each in enumerate(endings)]
    return several if len(endings) > 1 else [first]
