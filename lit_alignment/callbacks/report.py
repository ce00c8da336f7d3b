"""The page that every training leaves: curves, figures, what became of the records, and its settings."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_alignment.callbacks.curves import Curves, drawn
from lit_alignment.callbacks.samples.html import STYLE, curve_svg
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.sources.report import DataReport
from lit_alignment.files import replaced
from lit_alignment.modules.base import alignment_module

PAGE = "report.html"
PICKS = "cherry_picks.html"
OTHERS = ("grad_norm", "learning_rate")  # of training, whatever the method


class RunReport(Callback):
    """Writes `report.html` into the run's folder at each validation and at the end; it needs no other file.

    Attributes:
        curves: What was logged, over optimizer steps: loss, gradient norm, learning rate, and all of validation.
    """

    def __init__(self) -> None:
        """Nothing was logged yet."""
        self.curves = Curves()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remember what was logged."""
        self.curves.note_step(trainer, pl_module, OTHERS[:1])
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.optimizers and step % max(1, every) == 0:
            self.curves.add("train/learning_rate", step, float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was measured, and write the page."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        names = [name.removeprefix("val/") for name in trainer.callback_metrics if name.startswith("val/")]
        self.curves.note_validation(trainer, names)
        self.write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        self.write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same, if something was trained."""
        self.curves.settle()
        if trainer.state.fn == "fit" and self.curves and trainer.world_size == 1:  # else ranks may have parted
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the page, on one process."""
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # every rank must ask for it
        self.curves.settle()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            groups = [*alignment_module(module).charts, *([name] for name in OTHERS)]
            known = {*drawn(module), *OTHERS}
            groups += [[name] for name in dict.fromkeys(n.partition("/")[2] for n in self.curves) if name not in known]
            charts = [chart for chart in self.curves.charts(groups) if chart]
            with replaced(directory / PAGE) as file:
                file.write(_page(directory, charts, list(datamodule_of(trainer).reports.values()), self.curves))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue the same curves."""
        return {"curves": self.curves.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's curves."""
        self.curves.load_state_dict(state_dict["curves"])


def _page(directory: Path, charts: Sequence[Any], reports: Sequence[DataReport], curves: Curves) -> str:
    title = escape("/".join(directory.absolute().parts[-2:]))
    drawn_charts = "".join(map(curve_svg, charts))
    picks = f"<p><a href={PICKS}>Answers at each validation</a></p>" if (directory / PICKS).is_file() else ""
    config = directory / "config.yaml"
    settings = escape(config.read_text(encoding="utf-8")) if config.is_file() else ""
    shown = f"<details><summary>config.yaml</summary><pre>{settings}</pre></details>" if settings else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><div class=charts>{drawn_charts}</div>{picks}"
        f"<h2>Figures</h2>{_figures(curves)}<h2>Data</h2>{_data(reports)}{shown}</html>\n"
    )


def _figures(curves: Curves) -> str:
    """A table with one row a curve: where it began and ended, and its extremes."""
    rows = []
    for name, points in curves.items():
        ends = [f"{value:.4g}" for _, value in (points[0], points[-1])]
        extremes = [choose(points, key=lambda point: point[1]) for choose in (min, max)]
        rows.append([name, *ends, *(f"{value:.4g} (step {step})" for step, value in extremes)])
    return _table(["", "first", "last", "lowest", "highest"], rows)


def _data(reports: Sequence[DataReport]) -> str:
    """A table with one row a split."""
    rows = []
    for report in reports:
        dropped = "; ".join(f"{count} {reason}" for reason, count in sorted(report.dropped.items())) or "none"
        share = f"{report.trained_tokens / report.tokens:.1%}" if report.trained_tokens else ""
        counts = (sum(report.sources.values()), report.examples, report.tokens, share, report.longest)
        rows.append([report.split, *map(str, counts), dropped])
    return _table(["", "records", "examples", "tokens", "trained", "longest", "dropped"], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td class=score>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
