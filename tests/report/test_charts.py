"""Charts: round ticks, and points where they belong."""

import pytest

from lit_alignment.report.charts import (
    BOTTOM,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    Series,
    charts_of,
    draw,
    labels,
    nice_ticks,
    short,
    thinned,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (1.93, 6.6, ["1", "2", "3", "4", "5", "6", "7"]),
        (-0.31, 0.12, ["-0.4", "-0.3", "-0.2", "-0.1", "0.0", "0.1", "0.2"]),
        (0.0, 1e-4, ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]),
        (0.0026, 0.005, ["0.0025", "0.0030", "0.0035", "0.0040", "0.0045", "0.0050"]),
        (3.0, 3.0, ["1", "2", "3", "4", "5"]),
        (9000.0, 41000.0, ["0", "10k", "20k", "30k", "40k", "50k"]),
    ],
)
def test_ticks_are_round_and_around_the_values(low, high, expected):
    marks = nice_ticks(low, high)
    assert labels(marks) == expected and marks[0] <= low and marks[-1] >= high


def test_long_and_short_numbers_are_few_characters():
    assert [short(value) for value in (0, 950, 1500, 2e6, -0.00005)] == ["0", "950", "1.5k", "2M", "-5e-5"]


def test_points_stand_at_their_steps_and_values():
    chart = draw("loss", [Series("val", [(0, 4.0), (10, 0.0)])], best=10)
    assert [point[:2] for point in chart.lines[0].points] == [(LEFT, TOP), (RIGHT, BOTTOM)] and chart.best == RIGHT
    assert draw("loss", [Series("val", [])]) is None


def test_early_spike_makes_the_axis_logarithmic():
    spiked = draw("perplexity", [Series("val", [(1, 1000.0), (2, 10.0), (3, 10.0)])])
    assert spiked.log and [tick.label for tick in spiked.y_ticks] == ["10", "100", "1k"]
    assert not draw("loss", [Series("val", [(1, 4.0), (2, 1.0), (3, 0.9)])]).log


def test_thinned_curve_keeps_its_spikes_and_ends():
    points = [(step, 100.0 if step == 777 else float(step % 3)) for step in range(5000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and (777, 100.0) in kept and kept == sorted(kept)
    assert kept[0][0] < 50 and kept[-1][0] > 4950


def test_training_stays_behind_validation_and_a_single_point_needs_no_chart():
    curves = {"train/loss": [(1, 2.0), (2, 1.0)], "val/loss": [(2, 1.5)], "val/recall": [(2, 0.5)]}
    (chart,) = charts_of(curves, [["loss"], ["recall"]], 2)
    assert [(line.name, line.light) for line in chart.lines] == [("train", True), ("val", False)]
