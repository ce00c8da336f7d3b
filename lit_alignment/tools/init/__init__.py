"""`lit-alignment init`: a short commented configuration for a method, or one of the recipes, in the working folder."""

from argparse import Namespace
from pathlib import Path

from lit_alignment.errors import ConfigError, writing
from lit_alignment.paths import fetched_path, shown
from lit_alignment.tools import parsers
from lit_alignment.tools.fetch import PACKAGED
from lit_alignment.tools.init.recipes import copy_files, copy_recipe, listing
from lit_alignment.tools.init.records import MOST, Records, look, look_alike, look_at_passages
from lit_alignment.tools.init.start import starting, word
from lit_alignment.tools.init.templates import METHODS, MethodTemplate, Values, configuration

LEAST = 10  # records of which some can be held out


def main(arguments: list[str]) -> None:
    """Write what is asked for, and say which commands come next.

    Raises:
        ConfigError: If a file is in the way, or the data do not fit the method.
    """
    options = parsers.init().parse_args(arguments)
    if options.method is None:  # behind --columns the parser takes it for one of them
        options.method = next((word for word in options.columns or [] if word in METHODS), None)
        options.columns = [word for word in options.columns or [] if word != options.method] or None
    if sum((options.list, options.recipe is not None, options.method is not None)) > 1:
        raise ConfigError("lit-alignment init: give a method, --recipe NAME or --list, one of them.")
    if options.list:
        print(listing())
    elif options.recipe is not None:
        print(copy_recipe(options.recipe))
    elif options.method is None:
        raise ConfigError(f"lit-alignment init: give a method ({', '.join(METHODS)}), --recipe NAME, or --list.")
    else:
        print(init(options))


def init(options: Namespace) -> str:
    """Write a method's configuration, with samples where no data are given; what to do next.

    Args:
        options: Those of the command line.

    Raises:
        ConfigError: If the file is there, or records do not fit the method.
    """
    kind, out = METHODS[options.method], options.out or Path(f"{options.method}.yaml")
    _check(options, out)
    data, val, passages, samples = options.data, options.val, options.passages, None
    if data is None:
        samples = copy_files(kind.samples, Path("sample_data") / options.method)
        data, val, passages = (str(samples / f"{name}.jsonl") for name in ("train", "test", "passages"))
    columns = _columns(options.columns)
    found = look(data, options.method, columns)
    held = None if val is None else look_alike(val, options.method, found, columns)
    read = "" if passages is None or options.method != "rag" else look_at_passages(passages)
    start = starting(options.model, options.method, (held or found).labels)
    found, sources = held or found, _sources(data, found, val, held)
    for folder in ("tiny", "tiny_vision") if options.model == parsers.TINY else ():
        copy_files(folder, Path("sample_model") / folder)
    values = Values(options.method, start, shown(out), sources, word(passages or ""), found)
    with writing(out, ConfigError, "Choose another folder, or another name with --out"):
        out.write_text(configuration(values), encoding="utf-8")
    tried = f", and records to try it on in {samples}" if samples is not None else ""
    commands = _next(kind, start.path, shown(out))
    said = [f"wrote {out}{tried}", *([f"passages: {read}"] if read else [])]
    return "\n".join([*said, "Next:", *(f"  lit-alignment {command}" for command in commands)])


def _check(options: Namespace, out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} is there already. Give another name with --out, or remove it.")
    if options.data is None and options.val is not None:
        raise ConfigError("--val needs --data.")
    if options.data is None and options.columns is not None:
        raise ConfigError("--columns needs --data.")
    if (options.data is not None) != (options.passages is not None) and options.method == "rag":
        raise ConfigError(
            "rag needs both --data FILE and --passages PATH: what is retrieved, text or records {title?, text}."
        )
    if options.passages is not None and options.method != "rag":
        raise ConfigError(f"--passages is read by rag, not by {options.method}. Remove it.")


def _columns(given: list[str] | None) -> dict[str, str] | None:
    """What `--columns` says, by field."""
    pairs = [each.partition("=") for each in given or []]
    if wrong := next((name for name, _, column in pairs if not (name and column)), None):
        raise ConfigError(f"--columns {wrong}: write FIELD=COLUMN, as prompt=Question.")
    return {name: column for name, _, column in pairs} or None


def _sources(data: str, found: Records, val: str | None, held: Records | None) -> str:
    """Lines of the data module's settings: what is trained, what validates, and what predict answers."""
    train = f"train: [{{{_source(data, found)}}}]"
    if val is not None and held is not None:
        given = f"[{{{_source(val, held)}}}]"
        return f"{train}\n    val: {given}\n    predict: {given}"
    if found.number < LEAST:
        raise ConfigError(
            f"{data}: {found.number} records are too few to hold some out for validation. Give --val FILE."
        )
    fraction = 0.1 if found.number < MOST else 0.02
    drawn = f"val_fraction: {fraction}  # held out for validation, drawn at random; or a file: val: [{{path: ...}}]"
    seen = "# To look at answers; most of these records are trained on too. To measure, name a file that is held out."
    return f"{train}\n    {drawn}\n    {seen}\n    predict: [{{{_source(data, found)}, num_rows: 20}}]"


def _source(path: str, found: Records) -> str:
    columns = ", ".join(f"{name}: {word(column)}" for name, column in (found.columns or {}).items())
    return f"path: {word(path)}" + (f", columns: {{{columns}}}" if columns else "")


def _next(kind: MethodTemplate, model: str, out: str) -> list[str]:
    """The commands from here to predictions."""
    names = [name for name in (model, *kind.models) if name in PACKAGED and model != parsers.TINY]
    missing = [name for name in names if not (fetched_path(name) / "config.json").is_file()]
    commands = [*(f"fetch {name}" for name in missing), f"inspect --config {out}"]
    commands += [*(f"{each} --config {out}" for each in kind.before), f"fit --config {out}"]
    return [*commands, f"predict --config {out} --ckpt_path newest"]
