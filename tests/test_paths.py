"""A name on the hub without a network is one message in seconds; with a mirror nothing changes."""

import socket
import threading
import time

import datasets
import pytest
from huggingface_hub import constants

from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.models.loading import BackboneConfig, load_tokenizer
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.paths import look_for_hub
from tests.helpers.commands import command


@pytest.fixture
def online(monkeypatch):
    """The libraries are not told to be offline, and nothing has been looked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    look_for_hub.cache_clear()
    yield monkeypatch
    look_for_hub.cache_clear()


@pytest.fixture
def nobody(online):
    """An endpoint at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    online.setattr(constants, "ENDPOINT", endpoint)
    return endpoint


def test_model_without_a_network_is_refused_at_once_and_names_the_setting(nobody):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"org/name: no folder .* {nobody} cannot be reached. Check backbone.path"):
        load_tokenizer(BackboneConfig("org/name"), TokensConfig())
    assert time.monotonic() - begin < 4 and constants.HF_HUB_OFFLINE


def test_name_of_the_tiny_model_leads_to_the_one_that_init_writes(nobody, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for written, said in (
        (False, "`lit-alignment init METHOD --model tiny` writes"),
        (True, "Did you mean sample_mod"),
    ):
        if written:
            assert command("init", "sft", "--model", "tiny").returncode == 0
        for words in ("chat tiny hi", "serve tiny --engine transformers --port 0", "export tiny --out out"):
            result = command(*words.split())
            assert result.returncode == 2 and said in result.stderr, result.stderr
    said = command("chat", "sample_model/tiny", "hi").stderr
    assert "sample_model/tiny: this folder has a configuration and no weights. Give the checkpoint of its" in said


def test_data_set_without_a_network_is_refused_at_once_and_names_the_setting(nobody):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"org/data: no file or folder .* {nobody} cannot be reached. Check data's"):
        list(SourceConfig("org/data").read())
    assert time.monotonic() - begin < 4


def test_hub_that_takes_too_long_is_given_up(online):
    online.setattr(socket, "create_connection", lambda *_: threading.Event().wait(60))
    begin = time.monotonic()
    assert look_for_hub(0.2) == f"{constants.ENDPOINT} cannot be reached"
    assert time.monotonic() - begin < 2


def test_mirror_that_listens_and_proxies_are_left_alone(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert look_for_hub() == "" and not constants.HF_HUB_OFFLINE
    look_for_hub.cache_clear()
    online.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    online.setenv("http_proxy", "http://127.0.0.1:3128")
    assert look_for_hub() == "" and not constants.HF_HUB_OFFLINE
