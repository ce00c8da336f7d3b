"""Completion of command lines, asked of the shells themselves."""

import shutil
import subprocess

import pytest

from lit_alignment.errors import ConfigError
from lit_alignment.tools.completion import main, script

ASK = """
source /dev/stdin
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _lit_alignment
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(*words):
    command = ["bash", "-c", ASK, "bash", "lit-alignment", *words]
    run = subprocess.run(command, input=script("bash"), capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_values_and_files(tmp_path, monkeypatch):
    assert {"estimate", "evaluate", "export"} == {*completed("e")}
    assert completed("sample", "--strat") == ["--strategy"]
    assert completed("sample", "--strategy", "b") == ["best_of_n"]
    assert completed("index", "") == ["build", "eval"]
    assert completed("fit", "--ck") == ["--ckpt_path"]
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert completed("fit", "--config", "mi") == ["mine.yaml"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_takes_the_script():
    loaded = 'autoload -U +X compinit && compinit -u; eval "$(cat)"; print $_comps[lit-alignment]'
    run = subprocess.run(["zsh", "-fc", loaded], input=script("zsh"), capture_output=True, text=True, check=True)
    assert "lit_alignment" in run.stdout and not run.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes_commands_and_values():
    def asked(line):
        source = f"source -; complete -C '{line}'"
        run = subprocess.run(["fish", "-c", source], input=script("fish"), capture_output=True, text=True, check=True)
        return [each.split("\t")[0] for each in run.stdout.splitlines()]

    assert {"estimate", "evaluate", "export"} == {*asked("lit-alignment e")}
    assert asked("lit-alignment sample --strategy b") == ["best_of_n"]


def test_another_shell_is_refused(capsys):
    with pytest.raises(ConfigError, match="invalid choice: 'csh'"):
        main(["csh"])
    main(["fish"])
    assert "complete -c lit-alignment" in capsys.readouterr().out
