"""`lit-alignment report`: the page of a run anew, or one page that compares several."""

from collections.abc import Sequence
from pathlib import Path

from lit_alignment.errors import ConfigError, writing
from lit_alignment.files import replaced
from lit_alignment.paths import shown
from lit_alignment.report.comparison import render_comparison
from lit_alignment.report.page import render_run
from lit_alignment.report.run import FILE, TrainingRun, read_run
from lit_alignment.tools import parsers

COMPARISON = Path("comparison.html")


def main(arguments: list[str]) -> None:
    """Write the page, and say where it is."""
    options = parsers.report().parse_args(arguments)
    folders = list(dict.fromkeys(map(_folder, options.runs)))
    runs = [read_run(folder) for folder in folders]
    if len(runs) == 1:
        page, out = render_run(runs[0]), options.out or folders[0] / "report.html"
    else:
        page, out = render_comparison(dict(zip(labels(folders, runs), runs, strict=True))), options.out or COMPARISON
    with writing(out, ConfigError, "Choose another --out"), replaced(out) as file:
        file.write(page)
    print(f"{'report' if len(runs) == 1 else f'comparison of {len(runs)} runs'}: {shown(out)}")


def _folder(path: Path) -> Path:
    """The folder of a run, of which a file may be named, or the only one below a folder.

    Raises:
        ConfigError: If it is not there, or holds several.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such folder. Name the folder of a run, such as runs/sft/version_0.")
    folder = path if path.is_dir() else path.parent
    below = [] if (folder / FILE).is_file() else sorted(each.parent for each in folder.glob(f"*/{FILE}"))
    if len(below) > 1:
        raise ConfigError(f"{path} holds {len(below)} runs. Name them: {' '.join(map(shown, below))}")
    return below[0] if below else folder


def labels(folders: Sequence[Path], runs: Sequence[TrainingRun]) -> list[str]:
    """Names by which runs are told apart: the last parts of their folders, or all where these are the same."""
    names = [run.folder for run in runs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
