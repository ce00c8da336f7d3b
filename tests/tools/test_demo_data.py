"""The demo's data: no held-out wording in training, and files that the generator writes."""

import importlib.util
import json

from tests.helpers import ROOT

FOLDER = ROOT / "configs/sft/support"


def generator():
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_files_are_what_the_generator_writes():
    files = generator().files()
    assert len(files) == 10
    for name, records in files.items():
        lines = (ROOT / "configs" / name).read_text().splitlines()
        assert [json.loads(line) for line in lines] == records


def test_rejected_answers_are_faulty():
    for pair in generator().files()["reward/support/train.jsonl"]:
        right, wrong = (pair[name]["content"] for name in ("chosen", "rejected"))
        assert right != wrong and list(json.loads(right)) == ["queue", "product", "order", "urgent"]


def test_no_held_out_wording_in_training():
    module = generator()
    assert not module.wordings(0) & module.wordings(1)
    train = " ".join(record["messages"][1]["content"] for record in load("train"))
    routes = [json.loads(record["messages"][2]["content"]) for record in load("test")]
    assert not any(route["product"] in train for route in routes)
    assert not any(route["order"] in train for route in routes if route["order"])
    for phrase in module.wordings(1):
        assert phrase.replace("{p}", "").replace("{o}", "").strip(" .") not in train


def test_answers_follow_from_the_requests():
    for record in load("train") + load("test"):
        request, answer = record["messages"][1]["content"], json.loads(record["messages"][2]["content"])
        assert list(answer) == ["queue", "product", "order", "urgent"] and answer["product"] in request
        assert (answer["order"] is None) or answer["order"] in request
