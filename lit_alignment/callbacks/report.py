"""The cherry-pick report: one HTML page that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

Curve = Sequence[tuple[int, float]]
COLORS = ("#2563eb", "#dc2626", "#059669", "#9333ea")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #16a34a; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; max-width: 90rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .6rem .8rem; border-bottom: 1px solid var(--line); }
td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; max-width: 26rem; font-size: .9rem; }
th { background: var(--soft); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.role { font-weight: 600; opacity: .6; font-size: .75rem; text-transform: uppercase; display: block; }
.match { box-shadow: inset 3px 0 var(--good); } .match::after { content: " \\2713"; color: var(--good); }
.reference { background: var(--soft); }
svg text { fill: currentColor; font-size: 12px; }
"""


@dataclass
class CherryPick:
    """One prompt and its answers.

    Args:
        dataset: Name of its source.
        id: Id of its record.
        messages: The conversation up to the answer.
        reference: The answer that the record has.
        answers: Answers by optimiser step.
        scores: Values of metrics by optimiser step and name.
    """

    dataset: str
    id: str
    messages: list[dict[str, Any]]
    reference: str | None
    answers: dict[int, str] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)


def render_report(title: str, curves: Mapping[str, Curve], picks: Sequence[CherryPick]) -> str:
    """The page: loss curves, and a table with one row a prompt and one column a validation."""
    steps = sorted({step for pick in picks for step in pick.answers})
    headings = ["prompt", "reference", *(f"step {step}" for step in steps)]
    rows = "".join(f"<tr>{_prompt(p)}{_reference(p)}{''.join(_answer(p, s) for s in steps)}</tr>" for p in picks)
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    matches = "".join(f"<th>{_matches(picks, s)}</th>" for s in steps)
    scores = f"<tr><th></th><th>exact matches</th>{matches}</tr>{_score_rows(picks, steps)}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1>{curve_svg(curves)}<h2>Answers at each validation</h2>"
        f"<div class=scroll><table><thead><tr>{head}</tr>{scores}</thead>"
        f"<tbody>{rows}</tbody></table></div></html>\n"
    )


def _score_rows(picks: Sequence[CherryPick], steps: Sequence[int]) -> str:
    """One row a metric with its mean over the prompts at each step; exact matches have a row already."""
    found = {name: None for pick in picks for values in pick.scores.values() for name in values}
    rows = []
    for name in found:
        cells = []
        for step in steps:
            values = [pick.scores[step][name] for pick in picks if name in pick.scores.get(step, {})]
            cells.append(f"<th>{sum(values) / len(values):.3g}</th>" if values else "<th></th>")
        if name != "exact_match":
            rows.append(f"<tr><th></th><th>{escape(name)}, mean</th>{''.join(cells)}</tr>")
    return "".join(rows)


def _matches(picks: Sequence[CherryPick], step: int) -> str:
    compared = [pick for pick in picks if pick.reference is not None]
    return f"{sum(_is_match(pick, step) for pick in compared)} of {len(compared)}" if compared else ""


def _is_match(pick: CherryPick, step: int) -> bool:
    return pick.reference is not None and pick.answers.get(step, "").strip() == pick.reference.strip()


def _prompt(pick: CherryPick) -> str:
    parts = (f"<span class=role>{escape(m['role'])}</span>{escape(str(m['content']))}\n" for m in pick.messages)
    return f"<td>{''.join(parts).rstrip()}</td>"


def _reference(pick: CherryPick) -> str:
    return f"<td class=reference>{escape(pick.reference or '')}</td>"


def _answer(pick: CherryPick, step: int) -> str:
    attribute = " class=match" if _is_match(pick, step) else ""
    return f"<td{attribute}>{escape(pick.answers.get(step, ''))}</td>"


def curve_svg(curves: Mapping[str, Curve], width: int = 640, height: int = 240) -> str:
    """Curves over optimiser steps as an inline picture; nothing if there are no points."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    last, low, high = max(s for s, _ in points), min(v for _, v in points), max(v for _, v in points)
    low, high = min(low, 0.0) if low < high / 3 else low, high if high > low else low + 1.0
    left, bottom, top = 56, height - 28, 12

    def place(step: int, value: float) -> str:
        x = left + (width - left - 12) * step / max(last, 1)
        return f"{x:.1f},{bottom - (bottom - top) * (value - low) / (high - low):.1f}"

    marks = []
    for row in range(5):
        value = low + (high - low) * row / 4
        y = bottom - (bottom - top) * row / 4
        marks.append(f"<line x1={left} x2={width - 12} y1={y} y2={y} stroke=currentColor stroke-opacity=.15 />")
        marks.append(f"<text x={left - 8} y={y + 4} text-anchor=end>{value:.3g}</text>")
    for index, (name, curve) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        line = " ".join(place(step, value) for step, value in curve)
        marks.append(f'<polyline points="{line}" fill=none stroke="{color}" stroke-width=2 />')
        marks += [
            f'<circle cx={xy.split(",")[0]} cy={xy.split(",")[1]} r=3 fill="{color}" />'
            for xy in (line.split() if len(curve) < 30 else [])
        ]
        marks.append(
            f'<text x={width - 20} y={top + 14 + 16 * index} text-anchor=end style="fill:{color}">{escape(name)}</text>'
        )
    marks.append(f"<text x={left} y={height - 8}>0</text>")
    marks.append(f"<text x={width - 12} y={height - 8} text-anchor=end>step {last}</text>")
    return f'<svg viewBox="0 0 {width} {height}" width={width} role=img aria-label="loss">{"".join(marks)}</svg>'
