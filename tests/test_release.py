"""What a release is made of agrees: the version, the changelog and the package's metadata."""

import re
import tomllib

import lit_alignment
from lit_alignment.tools import doctor
from tests.helpers import ROOT
from tests.helpers.commands import command

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RELEASES = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", re.MULTILINE)


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


def test_commands_print_the_version():
    assert command("--version").stdout == f"lit-alignment {lit_alignment.__version__}\n"
    assert doctor._machine()[0].startswith(f"lit-alignment {lit_alignment.__version__} in ")
