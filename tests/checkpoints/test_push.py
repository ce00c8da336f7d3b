"""`--push-to-hub`: what arrives at a server with the hub's API is the export."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants

from lit_alignment import SFTModule
from lit_alignment.cli import main
from lit_alignment.paths import look_for_hub
from tests.helpers import base_model_folder, chats, scoring_settings, sft_data, trainer


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: weights as large files, everything else within the commit."""

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.answer({"error": "not found"}, 404)

    def do_PUT(self):
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self):
        hub, content = self.server, self.body()
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(content))
            self.answer({"url": f"{hub.address}/someone/model", "id": "someone/model"})
        elif self.path == "/api/validate-yaml":  # of the card
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(content)["files"]
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/upload/{each['oid']}"}}}
                for each in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.address}/someone/model/commit/0"})
        else:
            self.answer({"error": f"unknown: {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.created, server.large, server.files = f"http://127.0.0.1:{server.server_port}", [], {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    look_for_hub.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    look_for_hub.cache_clear()


@pytest.fixture
def checkpoint(tmp_path):
    module = SFTModule(**scoring_settings(base_model_folder(tmp_path / "base"), True, {}))
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, sft_data(module, chats(2)))
    runner.save_checkpoint(tmp_path / "trained.ckpt")
    return tmp_path / "trained.ckpt"


@pytest.mark.parametrize("command", ["export", "merge"])
def test_what_arrives_is_the_export_under_its_new_name(command, hub, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--push-to-hub", "someone/model", "--private"]
    assert main([command, str(checkpoint), "--out", str(out), *options]) == 0
    assert f"pushed: {hub.address}/someone/model/commit/0" in capsys.readouterr().out
    assert hub.created[0]["name"] == "model" and hub.created[0]["organization"] == "someone"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == ("peft" if command == "export" else "transformers")
    assert "lit-alignment chat someone/model" in card


def test_what_cannot_be_pushed_is_told_before_the_export(hub, checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def said(*options):
        assert main(["export", str(checkpoint), "--out", str(out), *options]) == 2
        return capsys.readouterr().err

    assert "Write ACCOUNT/NAME" in said("--push-to-hub", "model")
    assert "Write ACCOUNT/NAME" in said("--push-to-hub", "some one/model")
    assert "--private is of --push-to-hub" in said("--private")
    with monkeypatch.context() as nobody:
        nobody.delenv("HF_TOKEN")
        nobody.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "nobody is logged in" in said("--push-to-hub", "someone/model")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        look_for_hub.cache_clear()
        assert "HF_HUB_OFFLINE is set" in said("--push-to-hub", "someone/model")
        look_for_hub.cache_clear()
    assert not out.exists()


def test_export_stays_where_the_hub_refuses_it(hub, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), "--out", str(out), "--push-to-hub", "someone/model"]) == 2
    said = capsys.readouterr().err
    assert "not pushed (" in said and "401" in said and f"hf upload someone/model {out}" in said
    assert "hf_wrong" not in said and (out / "adapter_config.json").is_file() and not hub.files
