"""The cherry-pick report: one HTML page that needs nothing else."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from typing import Any

from lit_alignment.data.multimodal.media import UnreadableMediaError, open_image
from lit_alignment.evaluation.samples import NotableResponse

Curve = Sequence[tuple[int, float]]
COLORS = ("#2563eb", "#dc2626", "#059669", "#9333ea")

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #16a34a; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem; max-width: 90rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .charts svg { max-width: 100%; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .6rem .8rem; border-bottom: 1px solid var(--line); }
td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; max-width: 26rem; font-size: .9rem; }
th { background: var(--soft); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.role { font-weight: 600; opacity: .6; font-size: .75rem; text-transform: uppercase; display: block; }
.match { box-shadow: inset 3px 0 var(--good); } .match::after { content: " \\2713"; color: var(--good); }
td small { display: block; margin-top: .5rem; padding-top: .4rem; border-top: 1px dashed var(--line); opacity: .7; }
.reference { background: var(--soft); }
td img { display: block; margin: .2rem 0; border: 1px solid var(--line); border-radius: 4px; min-height: 4rem; }
.score { min-width: 0; }
svg text { fill: currentColor; font-size: 12px; }
"""


@dataclass
class CherryPick:
    """One record and what the model made of it.

    Args:
        dataset: Name of its source.
        id: Id of its record.
        messages: The conversation that the model saw.
        known: What the record says beside it, by column: the reference, the label, or the responses.
        answers: What the model made of it, by optimizer step.
        right: Whether that is what the record says, by optimizer step; missing where it says nothing.
        scores: Values of metrics by optimizer step and name.
        documents: What the model retrieved, each on a line with its score, by optimizer step.
    """

    dataset: str
    id: str
    messages: list[dict[str, Any]]
    known: dict[str, str | None]
    answers: dict[int, str] = field(default_factory=dict)
    right: dict[int, bool] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    documents: dict[int, list[str]] = field(default_factory=dict)


def render_report(
    title: str,
    charts: Sequence[Mapping[str, Curve]],
    picks: Sequence[CherryPick],
    right: str = "exact matches",
    pictures: Mapping[str, str] | None = None,
    notable: Sequence[NotableResponse] = (),
) -> str:
    """The page: loss curves, pictures, and a table with one row a record and one column a validation.

    Args:
        title: Name of the run.
        charts: Curves of each: points over optimizer steps, by name.
        picks: The records.
        right: What is counted where a record has been met.
        pictures: Inline pictures by heading.
        notable: Responses of training, to be shown under the curves.
    """
    steps = sorted({step for pick in picks for step in pick.answers})
    known = list(picks[0].known) if picks else []
    headings = ["prompt", *known, *(f"step {step}" for step in steps)]
    rows = "".join(f"<tr>{_messages(p.messages)}{_known(p)}{''.join(_answer(p, s) for s in steps)}</tr>" for p in picks)
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    matches = "".join(f"<th>{_matches(picks, s)}</th>" for s in steps)
    lead = "<th></th>" * len(known)
    scores = f"<tr>{lead}<th>{escape(right)}</th>{matches}</tr>{_score_rows(picks, steps, lead)}"
    drawn = "".join(curve_svg(chart) for chart in charts)
    shown = "".join(f"<h2>{escape(name)}</h2>{picture}" for name, picture in (pictures or {}).items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1><div class=charts>{drawn}</div>{_notable(notable)}{shown}<h2>At each validation</h2>"
        f"<div class=scroll><table><thead><tr>{head}</tr>{scores}</thead>"
        f"<tbody>{rows}</tbody></table></div></html>\n"
    )


def _notable(responses: Sequence[NotableResponse]) -> str:
    """A table with one row a response of training; nothing where there is none."""
    names = list({name: None for response in responses for name in response.scores})
    rows = []
    for each in responses:
        cut = "<small>cut at the limit of tokens</small>" if each.truncated else ""
        values = [f"{each.scores[name]:.3g}" if name in each.scores else "" for name in names]
        scores = "".join(f"<td class=score>{value}</td>" for value in values)
        response = f"<td>{escape(each.text)}{cut}</td>"
        rows.append(f"<tr><th>{escape(each.title)}</th>{_messages(each.messages)}{response}{scores}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", "prompt", "response", *names))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>Of the last rollout</h2><div class=scroll>{table}</div>" if responses else ""


def _score_rows(picks: Sequence[CherryPick], steps: Sequence[int], lead: str) -> str:
    """One row a metric with its mean over the records at each step; exact matches have a row already."""
    found = {name: None for pick in picks for values in pick.scores.values() for name in values}
    rows = []
    for name in found:
        cells = []
        for step in steps:
            values = [pick.scores[step][name] for pick in picks if name in pick.scores.get(step, {})]
            cells.append(f"<th>{sum(values) / len(values):.3g}</th>" if values else "<th></th>")
        if name != "exact_match":
            rows.append(f"<tr>{lead}<th>{escape(name)}, mean</th>{''.join(cells)}</tr>")
    return "".join(rows)


def _matches(picks: Sequence[CherryPick], step: int) -> str:
    compared = [pick.right[step] for pick in picks if step in pick.right]
    return f"{sum(compared)} of {len(compared)}" if compared else ""


def _messages(messages: Sequence[dict[str, Any]]) -> str:
    """A cell with messages, their pictures small."""
    parts = []
    for message in messages:
        pictures = "".join(thumbnail(path) for path in message.get("images", []))
        files = "".join(f"<small>{escape(path)}</small>" for path in message.get("audios", []))
        text = escape(str(message["content"]))
        parts.append(f"<span class=role>{escape(message['role'])}</span>{pictures}{files}{text}\n")
    return f"<td>{''.join(parts).rstrip()}</td>"


@cache
def thumbnail(path: str, side: int = 128) -> str:
    """A small copy of a picture as an inline image; a note where it cannot be read."""
    try:
        image = open_image(path)
    except UnreadableMediaError as error:
        return f"<small>{escape(str(error))}</small>"
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "PNG")
    name = "an inline picture" if path.startswith("data:") else path
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _known(pick: CherryPick) -> str:
    return "".join(f"<td class=reference>{escape(text or '')}</td>" for text in pick.known.values())


def _answer(pick: CherryPick, step: int) -> str:
    attribute = " class=match" if pick.right.get(step) else ""
    retrieved = "\n".join(pick.documents.get(step, []))
    shown = f"<small>{escape(retrieved)}</small>" if retrieved else ""
    return f"<td{attribute}>{escape(pick.answers.get(step, ''))}{shown}</td>"


def curve_svg(curves: Mapping[str, Curve], width: int = 640, height: int = 240) -> str:
    """Curves over optimizer steps as an inline picture; nothing if there are no points."""
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
    names = escape(", ".join(curves))
    return f'<svg viewBox="0 0 {width} {height}" width={width} role=img aria-label="{names}">{"".join(marks)}</svg>'


def confusion_svg(counts: Sequence[Sequence[int]], labels: Sequence[str], cell: int = 64) -> str:
    """A confusion matrix as an inline picture: rows are true classes, columns predicted ones.

    Args:
        counts: Number of examples by true and predicted class.
        labels: Names of the classes.
        cell: Side of a square.
    """
    left = 24 + 8 * max(map(len, labels))
    top, size = 40, len(labels) * cell
    marks = [f"<text x={left} y=14>predicted (columns) for true classes (rows)</text>"]
    for row, (label, line) in enumerate(zip(labels, counts, strict=True)):
        y, total = top + row * cell, max(1, sum(line))
        shown = escape(label)
        marks.append(f"<text x={left - 8} y={y + cell / 2 + 4} text-anchor=end>{shown}</text>")
        marks.append(f"<text x={left + (row + 0.5) * cell} y={top - 8} text-anchor=middle>{shown}</text>")
        for column, count in enumerate(line):
            x, color = left + column * cell, COLORS[2] if row == column else COLORS[1]
            share = count / total
            marks.append(
                f'<rect x={x} y={y} width={cell - 2} height={cell - 2} fill="{color}" fill-opacity={share:.2f} '
                f"stroke=currentColor stroke-opacity=.2 />"
            )
            place = f"x={x + cell / 2 - 1} text-anchor=middle"
            marks.append(f"<text {place} y={y + cell / 2}>{count}</text>")
            marks.append(f"<text {place} y={y + cell / 2 + 16} opacity=.7>{share:.0%}</text>")
    width, height = left + size + 8, top + size + 8
    picture = "".join(marks)
    return f'<svg viewBox="0 0 {width} {height}" width={width} role=img aria-label="confusion matrix">{picture}</svg>'
