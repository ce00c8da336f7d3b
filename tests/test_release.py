"""What a release is made of agrees: version, changelog, metadata of the package, and the workflow that tests it."""

import re
import tomllib

import yaml

import lit_alignment
from lit_alignment.tools import doctor
from tests.helpers import ROOT
from tests.helpers.commands import command

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
RELEASES = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", re.MULTILINE)


def steps():
    """Every step of the workflow's jobs."""
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_version_stands_in_one_place_and_is_the_newest_release_of_the_changelog():
    assert PYPROJECT["project"]["dynamic"] == ["version"] and "version" not in PYPROJECT["project"]
    source = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE) == [lit_alignment.__version__]
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = RELEASES.findall(text)
    assert releases[0][0] == lit_alignment.__version__
    assert text.index("## [Unreleased]") < text.index(f"## [{releases[0][0]}]")
    dates = [date for _, date in releases]
    assert dates == sorted(dates, reverse=True)


def test_nothing_stands_twice_in_the_changelog():
    releases = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    lines = [line for release in releases for line in release.splitlines() if line.startswith("- ")]
    assert len(lines) == len({*lines})
    headings = [re.findall(r"^### (.+)$", release, re.MULTILINE) for release in releases]
    assert all(len(each) == len({*each}) for each in headings)


def test_commands_print_the_version():
    assert command("--version").stdout == f"lit-alignment {lit_alignment.__version__}\n"
    assert doctor._machine()[0].startswith(f"lit-alignment {lit_alignment.__version__} in ")


def test_workflow_runs_every_python_that_the_package_is_for():
    project = PYPROJECT["project"]
    oldest = project["requires-python"].removeprefix(">=")
    named = [each.rpartition(" ")[2] for each in project["classifiers"] if ":: Python ::" in each]
    rows = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert oldest == rows[0]["python"] == named[0] and {*named} <= {row["python"] for row in rows}
    others = {step["with"]["python-version"] for step in steps() if "setup-python" in step.get("uses", "")}
    assert others == {oldest, "${{ matrix.python }}"}


def test_workflow_calls_targets_of_the_makefile():
    runs = [step["run"] for step in steps() if "run" in step]
    assert runs and all(run.startswith("make ") for run in runs)
    matrix = [row["targets"] for row in WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"]]
    words = " ".join(run.removeprefix("make ").replace("${{ matrix.targets }}", "") for run in runs)
    called = {word for word in [*words.split(), *" ".join(matrix).split()] if "=" not in word}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert called <= {*targets} and {"install", "lint", "test", "test-fast", "test-vllm", "docs", "dist"} <= called


def test_workflow_may_read_alone_and_ends():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] <= 90 for job in WORKFLOW["jobs"].values())
    cached = "\n".join(step["with"].get("cache-dependency-path", "") for step in steps() if "with" in step)
    assert cached and all((ROOT / name).exists() for name in cached.split())
