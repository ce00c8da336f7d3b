"""No key, token or password leaves the process: one is planted in every setting that takes it."""

import json
import logging
import re

import fsspec
import pytest
import yaml

from lit_alignment.cli import main
from lit_alignment.secrets import MASK, is_secret, mask_text, masked
from lit_alignment.tools import parsers
from lit_alignment.tools.serve import _api_key
from tests.helpers import ROOT

PLANTED = "planted9"
OPTIONS = {
    "key": f"key-{PLANTED}",
    "secret": f"secret-{PLANTED}",
    "token": f"token-{PLANTED}",
    "client_kwargs": {"aws_session_token": f"session-{PLANTED}", "region_name": "eu"},
    "endpoint_url": f"https://user:{PLANTED}@host/path?sig={PLANTED}",
    "config": [{"password": PLANTED, "accountKey": PLANTED}],
    "connection_string": f"Endpoint=x;AccountKey={PLANTED}",
    "headers": {"PRIVATE-TOKEN": PLANTED, "X-Anything": PLANTED},
}


def everything(folder):
    """All that a run has written on this disk and on the other side, by file."""
    remote = fsspec.filesystem("memory")
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found | {path: remote.cat_file(path) for path in remote.find("/planted")}


def test_secrets_stand_in_no_file_log_or_upload_of_a_run(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    config = yaml.safe_load((ROOT / "configs/sft/tiny.yaml").read_text())
    upload = {"url": "memory://planted", "storage_options": OPTIONS}
    config["trainer"] |= {"max_steps": 1, "default_root_dir": str(tmp_path / "run"), "enable_checkpointing": True}
    config["trainer"]["callbacks"] = [{"class_path": "lit_alignment.Upload", "init_args": upload}]
    config["trainer"]["logger"] = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "run")}},
    ]
    config["vllm"] = {"hf_token": PLANTED}
    (tmp_path / "secret.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "secret.yaml")]) == 0
    said = capfd.readouterr()
    assert PLANTED not in said.out + said.err + caplog.text
    written = everything(tmp_path / "run")
    assert not [path for path, content in written.items() if PLANTED.encode() in content]
    saved = [path for path in written if str(path).endswith("config.yaml")]
    assert len(saved) == 2  # here, and uploaded
    options = yaml.safe_load(written[saved[0]])["trainer"]["callbacks"][0]["init_args"]["storage_options"]
    assert (
        options["key"] == options["config"][0]["accountKey"] == MASK and options["client_kwargs"]["region_name"] == "eu"
    )
    assert options["endpoint_url"] == f"https://{MASK}@host/path?sig={MASK}"
    assert main(["fit", "--config", str(saved[0])]) == 2  # what it lacks is asked for
    assert ": *** stands for a secret, which a run does not write down" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.callbacks+=lit_alignment.Upload", f"--trainer.callbacks.storage_options.secret={PLANTED}"],
        ["--trainer.callbacks", json.dumps([{"class_path": "lit_alignment.Uploadd", "init_args": OPTIONS}])],
        ["--trainer.callbacks", json.dumps([{"class_path": "lit_alignment.Upload", "init_args": {"x": OPTIONS}}])],
        ["--ckpt_path", f"s4://user:{PLANTED}@bucket/x.ckpt"],
        ["--vllm", json.dumps([OPTIONS])],
    ],
)
def test_messages_do_not_quote_secrets(arguments, tmp_path, capfd):
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "1"]
    assert main(["fit", "--config", "configs/sft/tiny.yaml", *root, *arguments]) == 2
    assert PLANTED not in capfd.readouterr().err


def test_names_of_secrets_are_told_from_those_of_tokens():
    names = ["key", "api_key", "apiKey", "HF_TOKEN", "token", "aws_secret_access_key", "passwd", "session_token"]
    assert all(map(is_secret, names))
    assert all(map(is_secret, ["github_token", "connection_string", "creds", "jwt", "secretkey", "client_secret"]))
    names = ["tokens", "pad_token", "max_tokens", "tokens_per_batch", "token_id", "passages", "monitor", "keyword"]
    assert not any(map(is_secret, names))
    settings = {"image": {"token": "<image>"}, "tokens": {"new": {"<key>": {}}}, "api_key": None, "key": 5}
    assert masked(settings) == settings | {"key": MASK}
    chat = "See https://docs.org/. Answer with the password: swordfish."  # a text is no setting
    source = {"system_prompt": chat, "records": [{"meta": {"key": "C major"}, "password": "x"}]}
    assert masked(source) == source and masked({"note": chat}) == {"note": chat}
    texts = ["Authorization: Bearer abcdefgh123", "{'password': 'two words'}", "s3://a:b/c@bucket/x", "AccountKey=abc"]
    for text in texts:
        assert not re.search("abcdefgh123|two|words|b/c|=abc", mask_text(text)), text
    assert mask_text("unknown key: model.x; pad_token: <pad>") == "unknown key: model.x; pad_token: <pad>"


def test_a_server_s_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("abc\n")
    assert _api_key(parsers.serve().parse_args(["x", "--api-key-file", str(tmp_path / "key")])) == "abc"
    monkeypatch.setenv("VLLM_API_KEY", "def")
    assert _api_key(parsers.serve().parse_args(["x"])) == "def"
    for wrong in (["--api-key-file", str(tmp_path)], ["--api-key-file", str(tmp_path / "key"), "--api-key", "x"]):
        with pytest.raises(ValueError, match="--api-key"):
            _api_key(parsers.serve().parse_args(["x", *wrong]))
