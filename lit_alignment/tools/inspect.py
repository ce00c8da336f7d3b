"""`lit-alignment inspect`: what the model will see, token by token, and what became of the records."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.base import AlignmentDataModule, Split
from lit_alignment.data.encoding.example import Example
from lit_alignment.data.encoding.messages import IGNORE_INDEX
from lit_alignment.errors import ConfigError
from lit_alignment.files import replaced
from lit_alignment.report.page import style
from lit_alignment.terminal import Terminal, printable
from lit_alignment.tools import parsers
from lit_alignment.tools.rollout import print_rollout, sample_rollout
from lit_alignment.trainer_cli import build_for_tool

STAGES: dict[Split, str] = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}
BINS = 12

VIEW_STYLE = """
svg { max-width: 44rem; }
.tokens { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; padding: .8rem; }
.tokens span { padding: 2px 0; border-radius: 3px; box-shadow: inset 0 0 0 .5px var(--line); }
.trained { background: #16a34a40; color: var(--ink); } .special { color: var(--dim); }
.zero { text-decoration: line-through; }
.key span { margin-right: 1rem; padding: 2px 6px; border-radius: 3px; }
"""


@dataclass(frozen=True)
class Token:
    """One token as shown.

    Args:
        position: Its place in the sequence.
        index: Its id.
        text: What it decodes to, line ends visible.
        trained: Whether the loss applies to it.
        weight: Its weight in the loss.
        special: Whether it is a special token.
    """

    position: int
    index: int
    text: str
    trained: bool
    weight: float
    special: bool


def main(arguments: list[str]) -> None:
    """Print the first examples of a split, and write a page if asked."""
    options, rest = parsers.inspect().split(arguments)
    cli = build_for_tool(rest)
    data = cli.datamodule
    if not data.sources_of(options.split):
        raise ConfigError(f"data.{options.split} is empty: nothing to inspect. Choose another --split.")
    if data.streaming and options.split == "train":
        raise ConfigError(
            "data.streaming is true, and inspect encodes all records. Set it to false, and num_rows of the sources; or "
            "choose another --split."
        )
    if options.rollout and options.split != "train":
        raise ConfigError(f"--rollout is of training prompts: leave --split {options.split} out.")
    groups = sample_rollout(cli, options.rollout) if options.rollout else []
    if not groups:  # or the Trainer has set it up
        data.setup(STAGES[options.split])
    examples = data.examples[options.split]
    rows = examples.rows(_first_of_each(examples["dataset"], options.number))
    views = [(row, data.views(row)) for row in rows]

    console = Terminal()
    for number, (row, sequences) in enumerate(views, start=1):
        for name, example in sequences:
            tokens = shown_tokens(example, data.tokenizer)
            console.rule(f"{options.split} {number}: {row['dataset']}/{row['id']}{name and ' ' + name}", align="left")
            console.print(_summary(tokens, data.marked))
            console.print(
                token_table(tokens) if options.tokens else run_table(tokens, console.is_terminal, data.marked)
            )
    if groups:
        asked = examples.rows([group.index for group in groups])
        print_rollout(console, groups, [f"{row['dataset']}/{row['id']}" for row in asked])
    console.rule("lengths", align="left")
    lengths = np.array(data.examples[options.split]["length"])
    console.print(terminal_histogram(lengths, data.encoding.max_length))
    console.rule("records", align="left")
    console.print(data.reports[options.split].line(), soft_wrap=True)
    if options.split != "predict" and data.packing:
        console.print(_packing_line(data, options.split))
    if options.html is not None:
        with replaced(options.html) as file:
            file.write(render_page(data, options.split, views, lengths))
        console.print(f"page: {options.html}")


def _first_of_each(names: Sequence[str], number: int) -> list[int]:
    """Positions of the first examples of each source."""
    counts: Counter[str] = Counter()
    found = []
    for position, name in enumerate(names):
        counts[name] += 1
        if counts[name] <= number:
            found.append(position)
    return found


def shown_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """The tokens of an example. The first never counts as trained: nothing predicts it."""
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    tokens = []
    for position, index in enumerate(example.input_ids):
        text = tokenizer.decode([index])
        if "\ufffd" in text:  # a part of a character
            text = str(tokenizer.convert_ids_to_tokens(index))
        text = printable(text)
        trained = position > 0 and example.labels[position] != IGNORE_INDEX
        weight = example.weights[position]
        tokens.append(Token(position, index, text, trained, weight if trained else 0.0, index in special))
    return tokens


def _summary(tokens: Sequence[Token], marked: str) -> str:
    number = sum(token.trained for token in tokens)
    return f"{len(tokens)} tokens, {number} {marked} ({number / len(tokens):.0%})"


def run_table(tokens: Sequence[Token], colour: bool, marked: str) -> Table:
    """One line a run of tokens that are trained alike."""
    table = Table(show_lines=True)
    for heading in ("position", "loss", "tokens"):
        table.add_column(heading, overflow="fold")
    for (trained, weight), run in groupby(tokens, key=lambda token: (token.trained, token.weight)):
        part = list(run)
        loss = (marked if weight == 1.0 else f"weight {weight:g}") if trained else ""
        table.add_row(f"{part[0].position}-{part[-1].position}", loss, _flow(part, colour))
    return table


def _flow(tokens: Sequence[Token], colour: bool) -> Text:
    """Tokens one after the other; neighbours differ in shade, so that their borders can be seen."""
    flow = Text()
    for token, number in collapsed(tokens):
        shown = token.text.replace("\n", "\\n\n")
        if not colour and token.trained:
            shown = f"[{shown}]"
        shade = "on grey23" if token.position % 2 else "on grey30"
        if token.trained:
            shade = "black on green3" if token.position % 2 else "black on spring_green2"
        flow.append(shown, style=f"bold {shade}" if token.special else shade)
        if number > 1:
            flow.append(f" x {number} ")
    return flow


def collapsed(tokens: Sequence[Token]) -> list[tuple[Token, int]]:
    """Tokens, each with how often it stands there in a row; only special ones are counted together."""
    found: list[tuple[Token, int]] = []
    for token in tokens:
        if found and token.special and found[-1][0].index == token.index:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((token, 1))
    return found


def token_table(tokens: Sequence[Token]) -> Table:
    """One line a token."""
    table = Table("position", "token", "id", "label", "weight", box=None)
    for token in tokens:
        label = str(token.index) if token.trained else str(IGNORE_INDEX)
        cells = [str(token.position), repr(token.text), str(token.index), label, f"{token.weight:g}"]
        table.add_row(*(Text(cell) for cell in cells), style="green" if token.trained else "dim")
    return table


def histogram(lengths: np.ndarray[Any, Any]) -> list[tuple[int, int, int]]:
    """(from, to, number) of equal bins over the lengths, both ends included."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    edges = range(low, high + 1, width)
    return [(start, start + width - 1, int(((lengths >= start) & (lengths < start + width)).sum())) for start in edges]


def terminal_histogram(lengths: np.ndarray[Any, Any], max_length: int) -> Text:
    """Bars of the lengths in tokens."""
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    lines = [f"{start:>7}-{end:<7}{'█' * round(40 * count / most):<40} {count}" for start, end, count in bins]
    middle, late = (int(np.percentile(lengths, q)) for q in (50, 95))
    return Text("\n".join([*lines, f"median {middle}, 95% up to {late}, max_length {max_length}"]))


def histogram_svg(lengths: np.ndarray[Any, Any], width: int = 640, height: int = 200) -> str:
    """The same bars as an inline picture."""
    bins = histogram(lengths)
    most, bottom, step = max(count for _, _, count in bins), height - 24, width / len(bins)
    marks = []
    for place, (start, end, count) in enumerate(bins):
        tall, x = (bottom - 20) * count / most, place * step
        marks.append(f"<rect x={x + 1:.1f} y={bottom - tall:.1f} width={step - 2:.1f} height={tall:.1f} class=bar />")
        marks.append(f"<text x={x + step / 2:.1f} y={bottom - tall - 4:.1f} text-anchor=middle>{count}</text>")
        marks.append(f"<text x={x + step / 2:.1f} y={height - 8} text-anchor=middle>{start}-{end}</text>")
    picture = "".join(marks)
    return f'<svg viewBox="0 0 {width} {height}" width={width} role=img aria-label="lengths">{picture}</svg>'


def _packing_line(data: AlignmentDataModule, split: Split) -> str:
    plan = data.plan(split)
    rows = len(plan.groups(0))
    if plan.tokens_per_batch is None:  # how long a row becomes is not known before there are responses
        return f"{rows} micro-batches of up to {data.batch_size} prompts"
    longest = max(data.tokens_per_batch, data.reports[split].longest)
    filled = data.reports[split].tokens / (rows * longest)
    return f"packed into {rows} rows of up to {longest} tokens, {filled:.1%} full"


def render_page(
    data: AlignmentDataModule,
    split: Split,
    views: Sequence[tuple[dict[str, Any], list[tuple[str, Example]]]],
    lengths: np.ndarray[Any, Any],
) -> str:
    """The view as one HTML page that needs nothing else."""
    parts = []
    for row, sequences in views:
        for name, example in sequences:
            tokens = shown_tokens(example, data.tokenizer)
            title = escape(f"{row['dataset']}/{row['id']} {name}")
            body = "".join(_token_html(*each) for each in collapsed(tokens))
            parts.append(
                f"<h2>{title}</h2><p>{_summary(tokens, data.marked)}</p><div class='scroll tokens'>{body}</div>"
            )
    report = escape(data.reports[split].line())
    packed = f"<p>{_packing_line(data, split)}</p>" if split != "predict" and data.packing else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{split}</title><style>{style()}{VIEW_STYLE}</style>"
        f"<h1>What the model sees: {split}</h1><p style='white-space:pre-wrap'>{report}</p>{packed}"
        f"<h2>Lengths in tokens</h2>{histogram_svg(lengths)}"
        f"<p class=key><span class=trained>{data.marked}</span><span class=special>special token</span>"
        "hover over a token for its id, label and weight</p>"
        f"{''.join(parts)}</html>\n"
    )


def _token_html(token: Token, number: int) -> str:
    label = token.index if token.trained else IGNORE_INDEX
    names = [n for n, on in (("trained", token.trained), ("special", token.special)) if on]
    if token.trained and token.weight == 0:
        names.append("zero")
    hint = f"position {token.position}, id {token.index}, label {label}, weight {token.weight:g}"
    text = escape(token.text).replace("\n", "\\n<br>")
    return f'<span class="{" ".join(names)}" title="{hint}">{text}</span>' + (f" x {number} " if number > 1 else "")
