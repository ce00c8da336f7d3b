"""The page of a run: one HTML file that needs nothing else."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lit_alignment.data.multimodal.media import UnreadableMediaError, open_image
from lit_alignment.evaluation.samples import Confusion
from lit_alignment.report.charts import charts_of
from lit_alignment.report.run import CherryPick, Points, TrainingRun
from lit_alignment.report.settings import asked_first, flat
from lit_alignment.report.words import Change, word_changes
from lit_alignment.terminal import printable

TEMPLATES = Path(__file__).with_name("templates")
LAST = ("grad_norm", "learning_rate")  # of training, whatever the method
OPEN = 12  # records that are not folded
SHORT = 160  # characters of a message that needs no fold
SHADES = 10  # of a confusion matrix: classes s0 to s10 of the style sheet
MOST_TILES = 6


@dataclass(frozen=True)
class Pane:
    """What the model made of a record at one step.

    Args:
        step: Optimizer step.
        marks: Words about the step: first, newest, best.
        pieces: The answer, in pieces that differ from the reference or do not.
        right: Whether it is what the record says; None where that says nothing.
        scores: Values by name.
        documents: What was retrieved, each on a line.
    """

    step: int
    marks: list[str]
    pieces: Sequence[tuple[Change, str]]
    right: bool | None
    scores: dict[str, float]
    documents: list[str]


@dataclass(frozen=True)
class Answers:
    """A record with what the model made of it.

    Args:
        pick: The record.
        shown: The first, the best and the newest step.
        every: All steps, where there are more than are shown.
        history: Whether each step is right.
        told: Whether the line that folds the record is all of its last message.
    """

    pick: CherryPick
    shown: list[Pane]
    every: list[Pane]
    history: list[tuple[int, bool]]
    told: bool


@dataclass(frozen=True)
class Figures:
    """Figures of a curve: where it began and ended, and its extremes."""

    name: str
    first: float
    last: float
    lowest: tuple[int, float]
    highest: tuple[int, float]


@dataclass(frozen=True)
class Tile:
    """A figure in large type.

    Args:
        name: Of the curve.
        value: The last one.
        note: Where it began, and its best.
    """

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Cell:
    """A cell of a confusion matrix: its number of examples, its share of the true class, and its shade."""

    count: int
    share: float
    shade: int
    right: bool
    predicted: str


@dataclass(frozen=True)
class Picture:
    """A picture of a record, small, or why there is none."""

    name: str
    source: str = ""
    problem: str = ""


def render_run(run: TrainingRun) -> str:
    """The page: what was trained on what, its answers, curves and figures, its data and its settings.

    Args:
        run: A training, as far as it has come.
    """
    settings = flat(run.config)
    best = run.best
    return render(
        "run.html",
        run=run,
        best=best,
        tiles=_tiles(run),
        settings=asked_first(settings),
        answers=answers_of(run),
        means=_means(run),
        open=OPEN,
        charts=charts_of(run.curves, chart_groups(run), best and best[0]),
        confusion=confusion_rows(run.confusion),
        score_names=list(dict.fromkeys(name for each in run.notable for name in each.scores)),
        figures=figures(run.curves),
        splits=run.splits,
    )


def render(name: str, **values: Any) -> str:
    """A template filled in: every value is text, and nothing in it is obeyed."""
    return _environment().get_template(name).render(**values)


def style() -> str:
    """The style sheet of all pages."""
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    parts = {"style": style(), "script": script}
    environment.globals |= {
        **{name: Markup(text) for name, text in parts.items()},  # noqa: S704 - files of this package
        **{f"{name}_hash": _hash(text) for name, text in parts.items()},
        "picture": picture,
    }
    environment.filters |= {"figure": lambda value: f"{value:.4g}", "count": lambda value: f"{value:,}"}
    return environment


def _hash(text: str) -> str:
    """By which a page's policy allows one inline style or script, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def picture(path: str, side: int = 160) -> Picture:
    """A small copy of a picture of a record."""
    name = "an inline picture" if path.startswith("data:") else path
    try:
        image = open_image(path)
    except UnreadableMediaError as error:
        return Picture(name, problem=str(error))
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return Picture(name, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")


def chart_groups(run: TrainingRun) -> list[list[str]]:
    """Names by chart: the method's, then what else was logged and changes, and at last what every training has."""
    grouped = {name for group in run.charts for name in group} | set(LAST)
    changing = [name for name, points in run.curves.items() if len({value for _, value in points}) > 1]
    others = dict.fromkeys(name.partition("/")[2] for name in changing)
    return [*run.charts, *([name] for name in others if name not in grouped), *([name] for name in LAST)]


def answers_of(run: TrainingRun) -> list[Answers]:
    """Each record with its first, best and newest answer, and all of them."""
    steps, found = run.steps, []
    best = run.best[0] if run.best else None
    for pick in run.picks:
        own = [step for step in steps if step in pick.answers]
        chosen = sorted({*own[:1], *own[-1:], *([best] if best in own else [])})
        panes = {step: _pane(pick, step, own, best) for step in own}
        every = list(panes.values()) if len(own) > len(chosen) else []
        history = [(step, pick.right[step]) for step in own if step in pick.right]
        found.append(Answers(pick, [panes[step] for step in chosen], every, history, _is_line(pick.messages)))
    return found


def _is_line(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether the last message of a prompt is one short line of a user."""
    if not messages or any(messages[-1].get(kind) for kind in ("images", "audios")):
        return False
    text = str(messages[-1].get("content", ""))
    return messages[-1]["role"] == "user" and len(text) <= SHORT and "\n" not in text


def _pane(pick: CherryPick, step: int, steps: Sequence[int], best: int | None) -> Pane:
    marks = ["before training"] if step == 0 else []
    marks += ["newest"] if step == steps[-1] and len(steps) > 1 else []
    marks += ["best step"] if step == best else []
    reference, answer = pick.known.get("reference"), pick.answers[step]
    pieces: Sequence[tuple[Change, str]] = word_changes(reference, answer) if reference else [("same", answer)]
    values = {name: value for name, value in pick.scores.get(step, {}).items() if name != "exact_match"}
    scores = {} if all(name in answer for name in values) else values  # rewards are the answer itself
    return Pane(step, marks, pieces, pick.right.get(step), scores, pick.documents.get(step, []))


def _means(run: TrainingRun) -> list[tuple[str, list[str]]]:
    """One row a step with how many records were met, and one a metric with its mean over them; columns are steps."""
    rows, steps = [], run.steps
    compared = [[pick.right[step] for pick in run.picks if step in pick.right] for step in steps]
    if any(compared):
        rows.append((run.right, [f"{sum(each)} of {len(each)}" if each else "" for each in compared]))
    for name in dict.fromkeys(name for pick in run.picks for values in pick.scores.values() for name in values):
        if name == "exact_match":  # counted above
            continue
        values = [
            [pick.scores[step][name] for pick in run.picks if name in pick.scores.get(step, {})] for step in steps
        ]
        rows.append((f"{name}, mean", [f"{sum(each) / len(each):.3g}" if each else "" for each in values]))
    return rows


def figures(curves: Mapping[str, Points]) -> list[Figures]:
    """A row for each curve."""
    rows = []
    for name, points in curves.items():
        low, high = (choose(points, key=lambda point: point[1]) for choose in (min, max))
        rows.append(Figures(name, points[0][1], points[-1][1], low, high))
    return rows


def _tiles(run: TrainingRun) -> list[Tile]:
    """The figures of the last validation, or of training where there was none; what ranks validations first."""
    stage = "val/" if any(name.startswith("val/") for name in run.curves) else "train/"
    judged = run.judge.name if run.judge else ""
    drawn = [stage + name for group in chart_groups(run) for name in group if name not in LAST]
    names = dict.fromkeys([judged, *drawn])
    tiles = []
    for name in [name for name in names if run.curves.get(name)][:MOST_TILES]:
        points, best = run.curves[name], run.best
        parts = [f"from {points[0][1]:.4g}"] if len(points) > 1 else []
        if name == judged and best and best[0] != points[-1][0]:
            parts.append(f"best {best[1]:.4g} at step {best[0]}")
        tiles.append(Tile(name, f"{points[-1][1]:.4g}", ", ".join(parts)))
    return tiles


def confusion_rows(confusion: Confusion | None) -> list[tuple[str, list[Cell], int, float]]:
    """Rows of the matrix: the true class, its cells, its number of examples, and the share that is right."""
    rows = []
    for number, (label, counts) in enumerate(zip(confusion.labels, confusion.counts, strict=True) if confusion else ()):
        total = sum(counts)
        shares = [count / max(1, total) for count in counts]
        cells = [
            Cell(count, share, round(SHADES * share), number == column, confusion.labels[column] if confusion else "")
            for column, (count, share) in enumerate(zip(counts, shares, strict=True))
        ]
        rows.append((label, cells, total, shares[number]))
    return rows
