"""`lit-alignment report`: pages of runs that are over."""

import pytest

from lit_alignment.report.run import TrainingRun, to_json
from tests.helpers.commands import command


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders of three runs, two of them below one folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/sft/version_0", "runs/sft/version_1", "runs/dpo/version_0"):
        (tmp_path / name).mkdir(parents=True)
        run = TrainingRun("SFT", "tiny", ["train"], "/".join(name.split("/")[1:]), curves={"val/loss": [(1, 2.0)]})
        (tmp_path / name / "report.json").write_text(to_json(run))
    return tmp_path


def test_several_runs_make_one_page(runs):
    result = command("report", "runs/sft/version_0", "runs/dpo")
    assert result.returncode == 0 and result.stdout == "comparison of 2 runs: comparison.html\n"
    page = (runs / "comparison.html").read_text()
    assert "sft/version_0" in page and "dpo/version_0" in page
    assert command("report", "runs/sft/version_0", "runs/dpo", "--out", "a/b.html").returncode == 0
    assert (runs / "a/b.html").read_text() == page


def test_page_of_one_run_is_written_anew(runs):
    result = command("report", "runs/sft/version_1/report.json")
    assert result.stdout == "report: runs/sft/version_1/report.html\n"
    assert "SFT of tiny on train" in (runs / "runs/sft/version_1/report.html").read_text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("runs/sft", "runs/sft holds 2 runs. Name them: runs/sft/version_0 runs/sft/version_1"),
        ("runs/nothing", "runs/nothing: no such folder. Name the folder of a run"),
        ("runs", "runs: no report.json in it. Name the folder of a run"),
    ],
)
def test_folder_that_is_not_one_run_is_refused(runs, asked, message):
    result = command("report", asked)
    assert result.returncode == 2 and message in result.stderr
