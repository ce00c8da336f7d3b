"""The report on an installation: what is there, what is not, and no secret."""

import re
import tomllib
from importlib import metadata

from lit_alignment.tools.doctor import ADDS
from tests.helpers import ROOT
from tests.helpers.commands import command

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements():
    extras = PROJECT["optional-dependencies"]
    return PROJECT["dependencies"] + [f'{line}; extra == "{name}"' for name in extras for line in extras[name]]


def test_every_extra_says_what_it_adds():
    assert ADDS.keys() == PROJECT["optional-dependencies"].keys()


def test_report_names_versions_and_what_is_missing_and_hides_secrets(monkeypatch):
    version = metadata.version

    def found(name):
        if name == "faiss-cpu":
            raise metadata.PackageNotFoundError(name)
        return "0.2" if name == "peft" else version(name)

    monkeypatch.setattr(metadata, "requires", lambda name: requirements())
    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setenv("HF_ENDPOINT", "https://user:hunter2@mirror")
    result = command("doctor")
    assert result.returncode == 0 and "hunter2" not in result.stdout
    assert f"\n  torch {version('torch')}\n" in result.stdout
    assert "\n  peft 0.2 (>=0.21 is needed)\n" in result.stdout
    assert re.search(r"\n  rag +pip install 'lit-alignment\[rag\]' +approximate search", result.stdout)
    assert re.search(rf"\n  deepspeed +deepspeed {version('deepspeed')} ", result.stdout)


def test_package_that_is_not_installed_is_said(monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    result = command("doctor")
    assert (
        result.returncode == 0 and "lit-alignment is not installed: its sources are used as they are" in result.stdout
    )
