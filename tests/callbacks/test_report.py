"""The page of a run, and the curves in it."""

import math
import re
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_alignment.callbacks.curves import MOST, Curves
from lit_alignment.callbacks.page import shown_config
from lit_alignment.callbacks.report import RunReport
from lit_alignment.report.page import render_run
from lit_alignment.report.run import Judge, read_run
from lit_alignment.report.settings import asked_first, flat
from tests.helpers import chats, sft_data, sft_module, trainer


def fit(folder, report, ckpt_path=None, **settings):
    module = sft_module()
    data = sft_data(module, chats(8), chats(4, seed=1), packing=False, batch_size=1)
    options = {"callbacks": [report, ModelCheckpoint(folder / "kept", filename="x")], "log_every_n_steps": 4}
    runner = trainer(folder, enable_checkpointing=True, logger=CSVLogger(folder, name="run"), **options | settings)
    runner.fit(module, data, ckpt_path=ckpt_path)
    return runner


def test_page_has_curves_figures_and_data_and_goes_on_after_a_resume(tmp_path):
    report = RunReport()
    fit(tmp_path, report)
    assert [step for step, _ in report.curves["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in report.curves["train/learning_rate"]] == [4, 8]
    again = RunReport()
    runner = fit(tmp_path, again, tmp_path / "kept/x.ckpt", max_epochs=2)
    assert again.curves["train/loss"][:8] == report.curves["train/loss"] and len(again.curves["train/loss"]) == 16
    assert [step for step, _ in again.curves["val/loss"]] == [8, 16]
    page = open(f"{runner.log_dir}/report.html").read()
    assert page.count("<svg") == 5  # loss, gradient norm, learning rate, accuracy, perplexity
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in page.split("<tr>")]
    step, lowest = min(again.curves["train/loss"], key=lambda point: point[1])
    (losses,) = (row for row in rows if row[:1] == ["train/loss"])
    assert losses[3:5] == [f"{lowest:.4g}", str(step)]
    shares = runner.datamodule.reports["train"]
    (counts,) = (row for row in rows if row[:1] == ["train"])
    assert counts[3:5] == [f"{shares.tokens:,}", f"{shares.trained_tokens / shares.tokens:.1%}"]


def test_page_and_data_beside_it_say_the_same(tmp_path):
    report = RunReport()
    saver = ModelCheckpoint(tmp_path / "kept", monitor="val/token_accuracy", mode="max")
    runner = fit(tmp_path, report, callbacks=[report, saver], max_epochs=2)
    run = read_run(Path(runner.log_dir))
    assert run.curves == report.curves and run.title == "SFT of tiny with random weights on train"
    assert run.judge == Judge("val/token_accuracy", "max") and run.best[0] in (8, 16)
    assert run.splits[0]["tokens"] == runner.datamodule.reports["train"].tokens
    assert render_run(run) == Path(runner.log_dir, "report.html").read_text()


def test_page_is_there_without_validation_and_after_an_error(tmp_path):
    class Fails(RunReport):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            super().on_train_batch_end(trainer, pl_module, *rest)
            if trainer.global_step == 2:
                raise KeyError

    with pytest.raises(KeyError):
        fit(tmp_path, Fails(), limit_val_batches=0)
    assert "train/loss" in (tmp_path / "run/version_0/report.html").read_text()
    fit(tmp_path, RunReport(), limit_val_batches=0, max_steps=1)
    assert "train/loss" in (tmp_path / "run/version_1/report.html").read_text()


def test_long_curve_spans_the_run_with_a_bounded_number_of_points():
    curves = Curves()
    for step in range(1, 5 * MOST):
        curves.add("train/loss", step, float(step))
    points = curves["train/loss"]
    assert MOST / 2 <= len(points) <= MOST and points[-1] == (5 * MOST - 1, 5.0 * MOST - 1)
    assert all(step == value for step, value in points) and points[0][0] < 10


def test_value_that_is_not_finite_or_of_an_earlier_step_is_no_point():
    curves = Curves()
    for step, value in ((0, 1.0), (2, math.nan), (3, 5.0), (3, 6.0), (2, 7.0)):
        curves.add("val/loss", step, value)
    assert curves == {"val/loss": [(3, 5.0)]}


def test_settings_of_a_page_are_read_where_something_is_masked():
    plain = "# lightning\nmodel:\n  image: {token: null}\n  optimizer: {learning_rate: 0.01}\n"
    assert shown_config(plain) == plain  # the placeholder of images is no secret
    shown = shown_config(plain + "trainer:\n  logger: {api_key: abc123}\n")
    assert "abc123" not in shown
    assert flat(shown)["trainer.logger.api_key"] == "***" and asked_first(flat(shown)) == {"learning rate": "0.01"}
