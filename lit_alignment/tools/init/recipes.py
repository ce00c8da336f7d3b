"""The recipes of `configs/`, in a checkout or as the wheel carries them, copied with the files that they name."""

import re
import shutil
from pathlib import Path

from lit_alignment.errors import ConfigError, writing
from lit_alignment.paths import recipes_dir

NAMED = re.compile(r"configs/([\w-]+(?:/[\w-]+)*(?:\.\w+)?)")
CODE = (".yaml", ".py", ".pyc")
OVERLAYS = ("adapters", "optimizers", "trainer")  # folders of files that go with another one


def recipe_names() -> list[str]:
    """All recipes, as `sft/tiny`."""
    found = recipes_dir().rglob("*.yaml")
    return sorted(str(path.relative_to(recipes_dir()).with_suffix("")) for path in found)


def listing() -> str:
    """Name and purpose of each recipe, one a line."""
    names = recipe_names()
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {_purpose(name)}" for name in names if Path(name).parent.name not in OVERLAYS]
    added = [f"  {name:<{width}}  {_purpose(name)}" for name in names if Path(name).parent.name in OVERLAYS]
    end = "Write one, with the files that it names: lit-alignment init --recipe NAME"
    return "\n".join(["recipes:", *lines, "to be given as a second --config:", *added, "", end])


def copy_recipe(name: str) -> str:
    """Write a recipe and what it names to where they stand in a checkout; what was written, and the command.

    Args:
        name: As `sft/tiny`, or the last part of it where no other one ends so.

    Raises:
        ConfigError: If there is none of this name, or a file of other content is in the way.
    """
    names, asked = recipe_names(), name.removeprefix("configs/").removesuffix(".yaml")
    found = [each for each in names if each == asked] or [each for each in names if each.rpartition("/")[2] == asked]
    if len(found) != 1:
        which = f"more than one: {', '.join(found)}" if found else "none (lit-alignment init --list has them)"
        raise ConfigError(f"--recipe {name}: of this name there is {which}.")
    files = sorted(_with_named(Path(f"{found[0]}.yaml"), set()))
    for file in files:
        _copy(recipes_dir() / file, Path("configs") / file)
    text = (recipes_dir() / f"{found[0]}.yaml").read_text(encoding="utf-8")
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    note = ""
    if "benchmarks" in head:
        note = "\nIts data come from a script of the repository (benchmarks/), which an installation does not have."
    return f"wrote {len(files)} files below configs/\n{head}{note}"


def copy_files(folder: str, target: Path) -> Path:
    """Copy a folder of the recipes' files into another one, and return that.

    Raises:
        ConfigError: If a file of other content is in the way.
    """
    for file in _files(recipes_dir() / folder):
        _copy(file, target / file.relative_to(recipes_dir() / folder))
    return target


def _with_named(file: Path, found: set[Path]) -> set[Path]:
    """A recipe, and all that it names: other recipes with theirs, and the whole folders of other files."""
    found.add(file)
    for name in NAMED.findall((recipes_dir() / file).read_text(encoding="utf-8")):
        path = recipes_dir() / name
        if path.suffix == ".yaml" and path.is_file():
            if Path(name) not in found:
                _with_named(Path(name), found)
        elif (path.exists() and path != recipes_dir() and path.parent != recipes_dir()) or path.is_dir():
            folder = path if path.is_dir() else path.parent
            found |= {each.relative_to(recipes_dir()) for each in _files(folder)}
    return found


def _files(folder: Path) -> list[Path]:
    """The files of a folder, without recipes and scripts."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in CODE]


def _copy(file: Path, target: Path) -> None:
    if target.exists():
        if not target.is_file() or target.read_bytes() != file.read_bytes():
            raise ConfigError(f"{target} is there already, with other content. Use another folder, or remove it.")
        return
    with writing(target, ConfigError, "Choose another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _purpose(name: str) -> str:
    """The first sentence of what a recipe says that it is for."""
    text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    lines = re.match(r"# Purpose:(.*\n(?:#  .*\n)*)", text)
    words = " ".join(line.lstrip("# ").strip() for line in lines[1].splitlines()) if lines else ""
    return re.split(r"(?<! al)[.:;](?: |$)", words)[0]
