"""Geometry of charts: what a template draws, in units of the picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from lit_alignment.report.run import Points

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 12, 194
MOST_POINTS = 240  # of a curve as drawn: about one in two units of the picture
MOST_DOTS = 40  # more of them hide the line
LOG_FROM = 20.0  # highest over middle value from which on the axis is logarithmic: few early values flatten the rest
COLORS = 8  # classes c0 to c7 of the style sheet


@dataclass(frozen=True)
class Tick:
    """A mark of an axis.

    Args:
        at: Where, in units of the picture.
        label: Its value.
    """

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve as drawn.

    Args:
        name: In the legend.
        color: Number of its colour.
        light: Whether it stays behind the others.
        points: x and y in units of the picture, optimizer step and value.
    """

    name: str
    color: int
    light: bool
    points: list[tuple[float, float, int, str]]

    @property
    def path(self) -> str:
        """The points of a polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in self.points)

    @property
    def dots(self) -> list[tuple[float, float, int, str]]:
        """Points that are drawn by themselves."""
        return self.points if (len(self.points) <= MOST_DOTS and not self.light) or len(self.points) == 1 else []


@dataclass(frozen=True)
class Series:
    """A curve to draw.

    Args:
        name: In the legend.
        points: Optimizer steps and values.
        color: Number of its colour.
        light: Whether it stays behind the others.
    """

    name: str
    points: Points
    color: int = 0
    light: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture of curves over optimizer steps.

    Args:
        title: What is drawn.
        lines: The curves.
        x_ticks: Optimizer steps.
        y_ticks: Values.
        best: Where the best step is; None where it is not in the picture.
        log: Whether the axis of the values is logarithmic.
    """

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    best: float | None = None
    log: bool = False
    size: tuple[int, int] = field(default=(WIDTH, HEIGHT))

    @property
    def hover(self) -> list[list[object]]:
        """Names, colours and points, for the script that shows the values under the pointer."""
        return [[line.name, line.color, line.points] for line in self.lines]


def draw(title: str, series: Sequence[Series], best: int | None = None) -> Chart | None:
    """A chart of all series that have points; None if none has.

    Args:
        title: What is drawn.
        series: The curves; those behind first.
        best: Optimizer step of the best validation.
    """
    series = [each for each in series if each.points]
    values = [value for each in series for _, value in each.points]
    if not values:
        return None
    steps = [step for each in series for step, _ in each.points]
    first, last = (0 if min(steps) < max(steps) / 4 else min(steps)), max(steps)
    log = min(values) > 0 and max(values) / median(values) > LOG_FROM
    marks = log_ticks(min(values), max(values)) if log else nice_ticks(min(values), max(values))
    scale = math.log10 if log else float
    low, high = scale(min(marks[0], min(values))), scale(max(marks[-1], max(values)))

    def x_of(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - first) / max(last - first, 1), 1)

    def y_of(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (scale(value) - low) / (high - low), 1)

    lines = [
        Line(
            each.name,
            each.color % COLORS,
            each.light,
            [(x_of(step), y_of(value), step, f"{value:.4g}") for step, value in thinned(each.points)],
        )
        for each in series
    ]
    return Chart(
        title,
        lines,
        [Tick(x_of(step), short(step)) for step in nice_ticks(first, last, whole=True) if first <= step <= last],
        [
            Tick(y_of(mark), label)
            for mark, label in zip(marks, map(short, marks) if log else labels(marks), strict=True)
        ],
        x_of(best) if best is not None and first <= best <= last and last > first else None,
        log,
    )


def thinned(points: Points) -> Points:
    """At most MOST_POINTS of them: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    edges = [len(points) * part // (MOST_POINTS // 2) for part in range(MOST_POINTS // 2 + 1)]
    kept: list[tuple[int, float]] = []
    for start, end in pairwise(edges):
        stretch = points[start:end]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def nice_ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round values, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    return [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the values; every other one where there are many."""
    powers = range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)
    return [10.0**power for power in powers[:: math.ceil(len(powers) / 6)]] + (
        [10.0 ** powers[-1]] if (len(powers) - 1) % math.ceil(len(powers) / 6) else []
    )


def labels(marks: Sequence[float]) -> list[str]:
    """The values of ticks with as many digits as tell them apart."""
    largest, gap = max(map(abs, marks)), min((b - a for a, b in pairwise(marks)), default=1.0)
    if largest >= 1e4 or gap < 0.9e-4:
        return [short(mark) for mark in marks]
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{mark:.{digits}f}" for mark in marks]


def short(value: float) -> str:
    """A number in a few characters: 1500 is 1.5k, 0.00002 is 2e-5."""
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def charts_of(curves: Mapping[str, Points], groups: Sequence[Sequence[str]], best: int | None) -> list[Chart]:
    """A chart for each group of names: its curves of training behind those of validation.

    A group that has been logged once has none: a table shows that better.

    Args:
        curves: By name, with its stage before a slash.
        groups: Names without their stage.
        best: Optimizer step of the best validation.
    """
    charts = []
    for group in groups:
        series = []
        for stage in ("train", "val"):
            for number, name in enumerate(group):
                shown = stage if len(group) == 1 else f"{stage} {name}"
                points, alone = curves.get(f"{stage}/{name}", []), f"val/{name}" not in curves
                series.append(Series(shown, points, number, light=stage == "train" and not alone))
        if any(len(each.points) > 1 for each in series):
            charts.append(draw(", ".join(group), series, best))
    return [chart for chart in charts if chart is not None]
