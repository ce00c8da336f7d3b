"""The documentation site: it builds without a warning, holds what it is to hold, and asks no other server."""

import re
import runpy
from dataclasses import dataclass

import pytest

import lit_alignment
from lit_alignment.config_help import Setting, public_classes
from tests.helpers import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, PluginError

ELSEWHERE = re.compile(r"<(?:link|script|img|iframe)\b[^>]*?(?:href|src)=\"?((?:https?:)?//[^\s\">]+)")
PAGES = runpy.run_path(str(ROOT / ".site/pages.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@pytest.mark.slow
def test_site_has_a_page_for_each_method_and_each_public_name(site):
    for method, word in PAGES["METHODS"].items():
        page = (site / f"reference/{method}.html").read_text()
        assert f"lit_alignment.{word}Module" in page and "learning_rate" in page
        assert method == "retriever" or (site / method / "index.html").is_file()
    described = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    for name, each in public_classes().items():
        assert name in PAGES["LEFT_OUT"] or f'id="{each.__module__}.{name}"' in described, name
    assert f"lit_alignment {lit_alignment.__version__}" in (site / "index.html").read_text()


@pytest.mark.slow
def test_pages_ask_no_other_server_for_anything(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:link|script|img|iframe)\b[^>]*?(?:href|src)=\"?((?:https?:)?//[^\s\">]+)", page.read_text()
        )
        assert not loaded, (page, loaded)


@pytest.mark.parametrize("text", ["[nowhere](missing.md)", "[no heading](index.md#missing)", "[no file](missing.yaml)"])
def test_broken_link_ends_the_build(text, tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/index.md").write_text(f"# Page\n\n{text}\n")
    places = {"docs_dir": str(tmp_path / "pages"), "site_dir": str(tmp_path / "site")}
    config = load_config(str(ROOT / "mkdocs.yml"), **places, nav=["index.md"], not_in_nav="", hooks=[], plugins=[])
    with pytest.raises(Abort, match="1 warnings in strict mode"):
        build(config)


class Undescribed:
    pass


@dataclass
class OnlyGenerated:
    size: int = 1


class WithMethod:
    """A class."""

    def run(self):
        pass


@pytest.mark.parametrize("kind", [Undescribed, OnlyGenerated, WithMethod])
def test_public_name_without_a_description_ends_the_build(kind):
    with pytest.raises(PluginError, match="has no docstring"):
        PAGES["_described"](f"{kind.__module__}.{kind.__name__}")


def test_setting_without_a_description_ends_the_build():
    settings = [Setting("size", "int", "1", "How many."), Setting("depth", "int", "1", "")]
    with pytest.raises(PluginError, match="setting 'depth' has no description"):
        list(PAGES["_yaml"](settings, "", "Model"))


def test_configuration_reference_is_yaml_of_lists_and_names():
    size = Setting("size", "int", "1", "How many.")
    settings = [
        Setting("sources", "list of Source", "[]", "Where from.", (size,)),
        Setting("generation", "Decoding by name or null", "null", "How.", (size,)),
    ]
    assert "\n".join(PAGES["_yaml"](settings, "", "Model")).splitlines() == [
        "# Where from. (list of Source)",
        "sources: # [], or:",
        "    # How many. (int)",
        "  - size: 1",
        "# How. (Decoding by name or null)",
        "generation: # null, or:",
        "  NAME:",
        "    # How many. (int)",
        "    size: 1",
    ]


def test_notebook_becomes_its_texts_code_and_output():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": "!lit-alignment doctor", "outputs": [{"text": ["fine\n"]}]},
        {"cell_type": "code", "source": "1 + 1", "outputs": [{"data": {"text/plain": "2"}}]},
    ]
    assert PAGES["notebook"]({"cells": cells}) == (
        "# Title\nText.\n\n```console\n!lit-alignment doctor\n```\n\n```text\nfine\n```\n\n"
        "```python\n1 + 1\n```\n\n```text\n2\n```\n"
    )
