"""Whatever value stands at a key of a shipped configuration, it is taken, or refused by one message."""

import contextlib
import copy
import errno
import io
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from lit_alignment.cli import main
from lit_alignment.errors import AlignmentError, ConfigError, constructing, disk_message
from lit_alignment.trainer_cli import build
from tests.helpers.commands import command

TINY = "configs/sft/tiny.yaml"
WRONG = ["x", -1, 0, 10**30, float("nan"), "", [], {}, None, [1], {"a": 1}, -0.5, float("inf"), "../..", True]


def printed(config: str) -> dict[str, Any]:
    """A configuration with every setting in it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        build(["--config", config, "--print_config"])
    return yaml.safe_load(out.getvalue())


def leaves(value: Any, keys: tuple = ()) -> Iterator[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner or not value or (isinstance(value, list) and not isinstance(value[0], dict)):
        yield keys
    else:
        for key, each in inner:
            yield from leaves(each, (*keys, key))


def with_value(config: dict[str, Any], keys: tuple, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    part: Any = changed
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return changed


def check(config: str, number: int, tmp_path) -> None:
    whole = printed(config)
    pairs = [(keys, wrong) for keys in leaves(whole) for wrong in WRONG]
    for keys, wrong in random.Random(0).sample(pairs, min(number, len(pairs))):
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(with_value(whole, keys, wrong)))
        try:
            build(["--config", str(path)])
        except (AlignmentError, OSError) as error:
            assert len(str(error)) < 1500, (keys, wrong)
        except Exception as error:  # what is looked for
            pytest.fail(f"{keys} = {wrong!r}: {type(error).__name__}: {error}")


@pytest.mark.slow
def test_wrong_value_is_no_traceback(tmp_path):
    check(TINY, 40, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["sft", "rag", "vlm", "reward", "classification"])
def test_many_wrong_values_are_no_traceback(tmp_path, method):
    check(f"configs/{method}/tiny.yaml", 200, tmp_path)


def test_fault_of_ours_in_a_constructor_stays_one():
    with pytest.raises(ConfigError, match="^Random: .*supported seed types"), constructing("x"):
        random.Random([])
    with pytest.raises(ConfigError, match="^given$"), constructing("x"):
        try:
            raise ConfigError("given")
        except ConfigError as error:
            raise ValueError("wrapped by the parser") from error
    with pytest.raises(FileNotFoundError, match="^no cache$"), constructing("x"):
        try:
            raise FileNotFoundError("no cache")
        except FileNotFoundError as error:
            raise ValueError("wrapped by the parser") from error
    with pytest.raises(AttributeError), constructing("x"):
        disk_message(None)  # type: ignore[arg-type] # raised in a file of the package


def test_disk_errors_of_the_user_are_messages_and_others_are_not(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "a/b")
    assert disk_message(full).startswith("a/b: no space left on device. Make room")
    assert disk_message(FileNotFoundError("ours")) == "ours"
    assert disk_message(OSError(errno.EBADF, "Bad file descriptor")) is None
    monkeypatch.setattr("lit_alignment.tools.inspect.main", lambda _: (_ for _ in ()).throw(full))
    assert main(["inspect"]) == 2


@pytest.mark.slow
def test_output_below_a_file_is_one_message(tmp_path):
    below = tmp_path / "file"
    below.write_text("")
    few = ["--config", TINY, "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
    cases = {
        "fit": [*few, f"--trainer.logger.init_args.save_dir={below}/x"],
        "predict": [
            *few,
            "--trainer.callbacks=[{class_path: lit_alignment.PredictionWriter, init_args: {output_dir: "
            f"{below}/x}}}}]",
            f"--trainer.logger.init_args.save_dir={tmp_path}",
        ],
        "inspect": ["--config", TINY, "--html", f"{below}/x.html"],
    }
    for name, arguments in cases.items():
        result = command(name, *arguments)
        message = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and str(below) in message, (name, message)
        assert "path" in message or "set " in message, message
