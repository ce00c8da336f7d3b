"""`lit-alignment convert`: a JSON configuration of turbo-alignment as one of ours."""

import argparse
import sys
from pathlib import Path

from lit_alignment.errors import ConfigError
from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.kinds import KINDS, SHORT, kind_of
from lit_alignment.tools.convert.settings import Notes, Settings, read_json


def main(arguments: list[str]) -> None:
    """Write our configuration beside the old one, and say what to know about it.

    Raises:
        ConfigError: If the file is no configuration, lacks a setting, or is of a kind that is not converted.
    """
    options = _parser().parse_args(arguments)
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
        text = document.text(target, options.config, notes)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{target} cannot be written ({error.strerror}). Choose another --out.") from error
    for title, lines in (
        ("warning", notes.warnings),
        ("not carried over", notes.left_out),
        ("unknown key", notes.unknown),
    ):
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)
    for document, target in zip(documents, targets, strict=True):
        print(f"{target} is written. Run: {document.how_to_run(target)}")


def convert(top: Settings, kind: str) -> list[Document]:
    """Our documents for an old configuration.

    Args:
        top: The old configuration; its notes are filled.
        kind: The old command that takes it.

    Raises:
        ConfigError: If this kind is not converted.
    """
    match kind:
        case "train_sft":
            from lit_alignment.tools.convert.sft import convert as convert_kind
        case "inference_chat":
            from lit_alignment.tools.convert.inference import convert as convert_kind
        case "inference_rag":
            from lit_alignment.tools.convert.inference import convert_rag as convert_kind
        case "merge_adapters_to_base":
            from lit_alignment.tools.convert.merge import convert as convert_kind
        case "train_classification":
            from lit_alignment.tools.convert.classification import convert as convert_kind
        case "inference_classification":
            from lit_alignment.tools.convert.classification import convert_inference as convert_kind
        case "train_rm":
            from lit_alignment.tools.convert.reward import convert as convert_kind
        case "inference_rm":
            from lit_alignment.tools.convert.reward import convert_inference as convert_kind
        case "train_multimodal":
            from lit_alignment.tools.convert.multimodal import convert as convert_kind
        case "preprocess_multimodal_dataset":
            from lit_alignment.tools.convert.multimodal import convert_preprocess as convert_kind
        case "inference_multimodal":
            from lit_alignment.tools.convert.inference import convert_multimodal as convert_kind
        case "train_rag":
            from lit_alignment.tools.convert.rag import convert as convert_kind
        case "random_sample" | "rm_sample" | "rso_sample":
            from lit_alignment.tools.convert.sampling import convert as convert_kind
        case "train_dpo" | "train_kto" | "train_ddpo":
            raise ConfigError(f"{kind}: preference training is not there yet, so this cannot be converted.")
        case _:
            raise ConfigError(f"{kind}: the conversion of this method is not there yet.")
    return convert_kind(top)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-alignment convert",
        description="Turn a JSON configuration of turbo-alignment into a YAML for lit-alignment, and list each setting "
        "that works otherwise, has no counterpart, or is not known.",
    )
    parser.add_argument("config", type=Path, help="the JSON file")
    parser.add_argument("--out", type=Path, help="file to write (default: beside the JSON file)")
    parser.add_argument(
        "--kind",
        choices=(*SHORT, *KINDS),
        metavar="KIND",
        help=f"if its keys do not tell: {', '.join(SHORT)}, or the old command that takes it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def _targets(first: Path, documents: list[Document]) -> list[Path]:
    """Where to write: one file, files that differ in their endings, or files with a number each."""
    if len(documents) <= 1:
        return [first]
    endings = [document.suffix for document in documents]
    if len(set(endings)) == len(endings):
        return [first.with_suffix(ending) for ending in endings]
    return [first.with_suffix(f".{index}{ending}") for index, ending in enumerate(endings)]
