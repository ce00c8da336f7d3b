"""`lit-alignment export` and `merge`: a checkpoint or an adapter as a plain Hugging Face folder, checked."""

from pathlib import Path
from typing import Any

from lit_alignment.checkpoints.export import DTYPES, ExportConfig, export
from lit_alignment.checkpoints.push import check_push, push
from lit_alignment.errors import ConfigError
from lit_alignment.moved import renamed
from lit_alignment.tools.options import OptionParser, positive


def main(arguments: list[str], merge: bool = False) -> None:
    """Export, compare the logits before and after, and print the largest difference.

    Raises:
        CheckpointError: If the difference is past the tolerance; nothing is written then.
        ConfigError: If the folder cannot be pushed.
    """
    options = vars(_parser(merge).parse_args(arguments))
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


def _parser(merge: bool) -> OptionParser:
    parser = OptionParser(
        prog=f"lit-alignment {'merge' if merge else 'export'}",
        description="Write a folder that from_pretrained and servers load, and compare its logits with the trained "
        "model's. Adapters are merged in float32 and cast once.",
    )
    parser.add_argument("source", type=Path, help="a .ckpt file, the folder of a sharded checkpoint, or of an adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--base", help="the base model, if it is not where the source says")
    if not merge:
        parser.add_argument("--form", choices=["auto", "merged", "adapter"], default="auto")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: that of the base's files")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--prompts", type=Path, help="chat records to compare on; a few questions by default")
    parser.add_argument("--tolerance", type=positive(), help="largest difference, as a share of the largest logit")
    parser.add_argument("--dequantize", action="store_true", help="merge what was trained over quantised weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--push-to-hub", metavar="ACCOUNT/NAME", help="also upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make a new repository of --push-to-hub private")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    return parser


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
