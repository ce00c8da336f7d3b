"""Several runs on one page."""

import re
from dataclasses import replace

import pytest

from lit_alignment.errors import ConfigError
from lit_alignment.report.comparison import compared_charts, compared_figures, render_comparison, side_by_side
from lit_alignment.report.run import CherryPick, Judge, TrainingRun

ASKED = [{"role": "user", "content": "2 + 2?"}]


def run(answers, **settings):
    """A run with one record."""
    pick = CherryPick(
        "d", "1", ASKED, {"reference": "four"}, answers, {step: text == "four" for step, text in answers.items()}
    )
    return TrainingRun("SFT", "tiny", ["train"], "sft/version_0", picks=[pick], **settings)


SLOW = run(
    {0: "dogs", 4: "for"},
    config="model: {init_args: {rate: 0.1}}\ntrainer: {max_epochs: 1, logger: {name: a}}",
    curves={"val/loss": [(2, 3.0), (4, 2.0)], "train/x": [(1, 1.0)]},
    judge=Judge("val/loss"),
)
FAST = run(
    {0: "dogs", 8: "four"},
    config="model: {init_args: {rate: 0.2}}\ntrainer: {max_epochs: 1, logger: {name: b}}",
    curves={"val/loss": [(4, 1.0), (8, 1.5)]},
    judge=Judge("val/loss"),
)


def test_only_settings_that_differ_are_listed_and_where_a_run_is_does_not_count():
    page = render_comparison({"slow": SLOW, "fast": FAST})
    table = page.partition("Settings that differ</h2>")[2].partition("</table>")[0]
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")]
    assert ["model.rate", "0.1", "0.2"] in rows and "max_epochs" not in table and "logger" not in table
    assert "None: the runs have the same settings" in render_comparison({"slow": SLOW, "again": SLOW})


def test_figures_are_the_last_and_the_extremes_with_the_best_run_marked():
    (loss,) = compared_figures([SLOW, FAST])
    assert loss.name == "val/loss" and loss.cells == [(2.0, 2.0, 3.0), (1.5, 1.0, 1.5)] and loss.best == [1]
    other = replace(FAST, judge=Judge("val/reward", "max"))  # runs of different kinds are not ranked
    assert compared_figures([SLOW, other])[0].best == []


def test_curves_of_all_runs_have_one_axis():
    (chart,) = compared_charts({"slow": SLOW, "fast": FAST})
    slow, fast = chart.lines
    assert (slow.name, fast.name) == ("slow", "fast") and slow.color != fast.color
    assert slow.points[1][0] == fast.points[0][0] and slow.points[1][2] == fast.points[0][2] == 4


def test_newest_answers_stand_side_by_side():
    (record,) = side_by_side({"slow": SLOW, "fast": FAST})
    assert {name: (pane.step, pane.right) for name, pane in record.panes.items()} == {
        "slow": (4, False),
        "fast": (8, True),
    }
    page = render_comparison({"slow": SLOW, "fast": FAST})
    assert re.findall("<b>(reference|slow|fast)</b>", page) == ["reference", "slow", "fast"]
    assert "0 of 1" in page and "1 of 1" in page


def test_more_runs_than_colours_are_refused():
    with pytest.raises(ConfigError, match="9 runs: one page compares up to 8"):
        render_comparison({str(number): SLOW for number in range(9)})
