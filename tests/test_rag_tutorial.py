"""The notebook on RAG over one's own files: its cells run in order in an empty folder, and its outputs can be shown."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lit_alignment.paths import fetched_path
from tests.helpers import ROOT, base_model_folder
from tests.helpers.commands import command

NOTEBOOK = ROOT / "configs/tutorials/rag-over-your-files.ipynb"
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2")
# Fewer files and steps, in one cell each.
SMALL = {
    'MODULES = "codecs contextlib difflib doctest functools inspect ': 'MODULES = "',
    "records[:60]": "records[:2]",
    "records[60:70]": "records[2:4]",
    "records[70:]": "records[4:]",
    "num_rows: 64": "num_rows: 4",
    "num_rows: 8}": "num_rows: 2}",
    "[20, 21, 22, 23, 24, 25, 26, 27, 28, 29]": "[1]",
}


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(cells):
    """Run cells as Jupyter would; the names they leave, and what the commands have said."""
    names, said = {}, []
    for cell in cells:
        if cell.startswith("%%writefile "):
            magic, _, text = cell.partition("\n")
            Path(magic.split()[1]).write_text(text, encoding="utf-8")
        elif cell.startswith("!"):
            for line in cell.splitlines():
                program, *words = shlex.split(line.removeprefix("!").format(**names))
                assert program == "lit-alignment"
                result = command(*words)
                assert result.returncode == 0, (line, result.stderr)
                said.append(result.stdout + result.stderr)
        else:
            exec(compile(cell, "a cell", "exec"), names)  # noqa: S102 - our own
    return names, said


@pytest.mark.slow
def test_every_cell_runs_with_tiny_models(tmp_path, monkeypatch, capsys):
    for model in MODELS:  # where `fetch` would have put the real ones
        base_model_folder(fetched_path(model))
    cells = "\0".join(code_cells())
    for large, small in SMALL.items():
        assert cells.count(large) == 1, large
        cells = cells.replace(large, small)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    names, said = run(cells.split("\0"))
    assert {len(names[each]) for each in ("first", "last")} == {2} and names["before"].keys() == names["after"].keys()
    assert names["response"].completions[0].text == names["model"].chat(names["question"], names["decoding"])
    titles = [each["title"] for each in names["response"].retrieved["documents"]]
    shown = capsys.readouterr().out
    assert len(titles) == 4 and all(title in shown for title in titles)
    assert re.search(r"\n  \[4\] \w+\.md: ", said[-1])
    assert any(f"  lit-alignment chat {names['checkpoint']} --index runs/index\n" in each for each in said)


@pytest.mark.tutorial
def test_real_models_find_no_less_after_training(tmp_path, monkeypatch):
    monkeypatch.delenv("LIT_ALIGNMENT_CACHE")
    monkeypatch.chdir(tmp_path)
    names, _ = run(code_cells())
    # So few questions teach the generator; of 60 test questions one more or less is chance.
    assert names["after"]["recall@1"] >= names["before"]["recall@1"] - 1 / 60
    right = [names["last"][str(i)] == record["completion"] for i, record in enumerate(names["parts"]["test"][:8])]
    assert sum(right) >= 1  # before training the generator answers in sentences


def test_outputs_are_those_of_a_whole_run_without_noise_or_paths_of_a_machine():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = "".join("".join(output["text"]) for output in outputs)
    assert not re.search(r"/(root|home|work|tmp|Users)/|Warning|Traceback|lit-alignment: error|\x1b", text)
