"""`lit-alignment export` and `merge`: a checkpoint or an adapter as a plain Hugging Face folder, checked."""

from typing import Any

from lit_alignment.checkpoints.export import ExportConfig, export
from lit_alignment.checkpoints.push import check_push, push
from lit_alignment.errors import ConfigError
from lit_alignment.moved import renamed
from lit_alignment.tools import parsers


def main(arguments: list[str], merge: bool = False) -> None:
    """Export, compare the logits before and after, and print the largest difference.

    Raises:
        CheckpointError: If the difference is past the tolerance; nothing is written then.
        ConfigError: If the folder cannot be pushed.
    """
    options = vars(parsers.export(merge).parse_args(arguments))
    repo, private = options.pop("push_to_hub"), options.pop("private")
    if merge:
        options |= {"form": "merged", "must_merge": True}
    if private and repo is None:
        raise ConfigError("--private is of --push-to-hub ACCOUNT/NAME.")
    if repo is not None:
        check_push(repo)
    export(ExportConfig(name=repo, **options))
    if repo is not None:
        print(f"pushed: {push(options['out'], repo, private)}")


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
