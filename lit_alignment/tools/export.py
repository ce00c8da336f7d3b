"""`lit-alignment export` and `merge`: a checkpoint or an adapter as a plain Hugging Face folder, checked."""

from typing import Any

from lit_alignment.checkpoints.export import ExportConfig, export
from lit_alignment.moved import renamed
from lit_alignment.tools import parsers


def main(arguments: list[str], merge: bool = False) -> None:
    """Export, compare the logits before and after, and print the largest difference.

    Raises:
        CheckpointError: If the difference is past the tolerance; nothing is written then.
    """
    options = vars(parsers.export(merge).parse_args(arguments))
    if merge:
        options |= {"form": "merged", "must_merge": True}
    export(ExportConfig(**options))


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
