"""The page that compares several runs: what differs in their settings, their figures, curves and answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_alignment.errors import ConfigError
from lit_alignment.report.charts import COLORS, Chart, Series, draw
from lit_alignment.report.page import Answers, Pane, answers_of, render
from lit_alignment.report.run import CherryPick, Points, TrainingRun
from lit_alignment.report.settings import differing, flat


@dataclass(frozen=True)
class Compared:
    """A curve's figures in each run.

    Args:
        name: Of the curve.
        cells: Its last value, and its lowest and highest, by run; None where a run has not logged it.
        best: Numbers of the runs with the best value, where all runs are ranked by it.
    """

    name: str
    cells: list[tuple[float, float, float] | None]
    best: list[int]


@dataclass(frozen=True)
class SideBySide:
    """A record with the newest answer of each run.

    Args:
        pick: The record.
        told: Whether the line that folds the record is all of its last message.
        panes: Answers by the name of their run.
    """

    pick: CherryPick
    told: bool
    panes: dict[str, Pane]


def render_comparison(runs: Mapping[str, TrainingRun]) -> str:
    """The page.

    Args:
        runs: At least two, by the names under which they are shown.

    Raises:
        ConfigError: If there are more than can be told apart.
    """
    if len(runs) > COLORS:
        raise ConfigError(f"{len(runs)} runs: one page compares up to {COLORS}. Name fewer.")
    titles = {run.title for run in runs.values()}
    return render(
        "comparison.html",
        runs=runs,
        title=f"{len(runs)} runs" + (f": {titles.pop()}" if len(titles) == 1 else " compared"),
        settings=differing([flat(run.config) for run in runs.values()]),
        machines=differing([run.machine for run in runs.values()]),
        figures=compared_figures(list(runs.values())),
        charts=compared_charts(runs),
        answers=side_by_side(runs),
    )


def names_of(runs: Sequence[TrainingRun]) -> list[str]:
    """Names of curves: what ranks the runs, losses, other figures of validation, then what several runs have."""
    judged = [run.judge.name for run in runs if run.judge]
    counts = Counter(name for run in runs for name in run.curves)
    names = [name for name, count in counts.items() if count > 1 or name.startswith("val/")]
    lead = [name for name in (*judged, "train/loss") if name in names]
    val = [name for name in names if name.startswith("val/")]
    return list(dict.fromkeys([*lead, *val, *names]))


def compared_figures(runs: Sequence[TrainingRun]) -> list[Compared]:
    """Figures of each curve, side by side."""
    rows = []
    judges = {run.judge for run in runs}
    modes = {judge.name: judge.mode for judge in judges if judge and len(judges) == 1}  # else they are not alike
    for name in names_of(runs):
        cells = [_figures(run.curves.get(name, [])) for run in runs]
        best: list[int] = []
        if name in modes:
            place, choose = (1, min) if modes[name] == "min" else (2, max)
            values = [cell[place] for cell in cells if cell]
            best = [number for number, cell in enumerate(cells) if cell and cell[place] == choose(values)]
        rows.append(Compared(name, cells, best))
    return rows


def _figures(points: Points) -> tuple[float, float, float] | None:
    values = [value for _, value in points]
    return (values[-1], min(values), max(values)) if values else None


def compared_charts(runs: Mapping[str, TrainingRun]) -> list[Chart]:
    """A chart for each curve that changes, with one line a run."""
    charts = []
    for name in names_of(list(runs.values())):
        series = [Series(own, run.curves.get(name, []), number) for number, (own, run) in enumerate(runs.items())]
        if len({point for each in series for point in each.points}) > 1:
            charts.append(draw(name, series))
    return [chart for chart in charts if chart is not None]


def side_by_side(runs: Mapping[str, TrainingRun]) -> list[SideBySide]:
    """Each record that a run has answered, with the newest answer of every run that has."""
    found: dict[tuple[str, str, str], SideBySide] = {}
    for name, run in runs.items():
        for each in answers_of(run):
            if each.shown:
                record = found.setdefault(_key(each), SideBySide(each.pick, each.told, {}))
                record.panes[name] = each.shown[-1]
    return list(found.values())


def _key(answers: Answers) -> tuple[str, str, str]:
    pick = answers.pick
    return pick.dataset, pick.id, str(pick.messages)
