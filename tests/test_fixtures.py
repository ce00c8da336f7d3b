"""What version 0.1 wrote is resumed, exported and predicted from as it would have been then."""

import json
import os
import shutil
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_alignment import ClassificationModule, DecodingConfig, SFTModule
from lit_alignment.tools import export, index
from lit_alignment.trainer_cli import build
from tests.helpers import ROOT

OLD = ROOT / "tests/fixtures/v0.1"
FILES = {"sft": "greedy", "classification": "classes", "reward": "rewards", "rag": "greedy", "vlm": "greedy"}
EXPECTED = json.loads((OLD / "expected.json").read_text())


def run(stage, method, folder, *options):
    arguments = ["--config", f"tests/fixtures/{method}.yaml", f"--trainer.default_root_dir={folder}"]
    if method == "rag":
        place = f"--model.init_args.index.path={folder / 'index'}"
        if not (folder / "index").exists():
            index.main(["build", *arguments[:2], place])
        arguments.append(place)
    return build([stage, *arguments, *options], run=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", FILES)
def test_checkpoint_resumes_with_the_losses_of_its_own_version(method, tmp_path):
    cli = run("fit", method, tmp_path, "--trainer.max_steps=4", f"--ckpt_path={OLD / method}.ckpt")
    assert cli.trainer.global_step == 4
    for name, value in EXPECTED[method].items():
        assert float(cli.trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_checkpoints_answer_without_a_trainer_as_they_did():
    settings = json.loads((OLD / "sft/greedy.settings.json").read_text())
    decoding = DecodingConfig(**{each.name: settings[each.name] for each in fields(DecodingConfig)})
    old = lines(OLD / "sft/greedy.jsonl")
    found = SFTModule.from_checkpoint(OLD / "sft.ckpt", device="cpu").generate([o["messages"] for o in old], decoding)
    assert found == [line["answers"][0]["content"] for line in old]
    for source in ("sharded.ckpt", "adapter"):
        assert isinstance(SFTModule.from_checkpoint(OLD / source, device="cpu").chat("the scale", decoding), str)
    old = lines(OLD / "classification/classes.jsonl")
    module = ClassificationModule.from_checkpoint(OLD / "classification.ckpt", device="cpu")
    for found, line in zip(module.classify([line["messages"] for line in old]), old, strict=True):
        assert found["prediction"] == line["prediction"]
        assert found["probabilities"] == pytest.approx(line["probabilities"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", FILES)
def test_predictions_of_a_checkpoint_go_on_after_those_that_are_there(method, tmp_path):
    name = FILES[method]
    old = lines(OLD / method / f"{name}.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / f"out/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old[:2]))
    settings = json.loads((OLD / method / f"{name}.settings.json").read_text())
    copy = shutil.copy(OLD / f"{method}.ckpt", tmp_path)  # the settings name the file and its time
    settings["checkpoint"] = [str(copy), os.stat(copy).st_mtime_ns]
    (tmp_path / f"out/{name}.settings.json").write_text(json.dumps(settings))
    writer = [{"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(tmp_path / "out")}}]
    run("predict", method, tmp_path, f"--ckpt_path={copy}", f"--trainer.callbacks={json.dumps(writer)}")
    new = lines(tmp_path / f"out/{name}.jsonl")
    assert [line["id"] for line in new] == [line["id"] for line in old]
    for found, expected in zip(new, old, strict=True):
        assert found.keys() == expected.keys() | {"fingerprint"}  # which they had not then
        if "answers" in expected:
            assert found["answers"] == expected["answers"]
        for scores in ("rewards", "probabilities"):
            assert found.get(scores, {}) == pytest.approx(expected.get(scores, {}), rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("source", [*(f"{method}.ckpt" for method in FILES), "sharded.ckpt", "adapter"])
def test_checkpoint_shards_and_adapter_are_exported(source, tmp_path, capsys):
    export.main([str(OLD / source), "--out", str(tmp_path / "out")])
    assert "same top token at 100.0% of positions" in capsys.readouterr().out


@pytest.mark.slow
def test_adapter_and_checkpoint_of_it_merge_to_the_same_model(tmp_path):
    ids = torch.arange(3, 40)[None]
    found = []
    for source in ("sft.ckpt", "adapter"):
        export.main([str(OLD / source), "--out", str(tmp_path / source), "--form", "merged"])
        found.append(AutoModelForCausalLM.from_pretrained(tmp_path / source)(input_ids=ids).logits)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
def test_sharded_checkpoint_resumes_in_one_process(tmp_path):
    cli = run("fit", "sft", tmp_path, "--trainer.max_steps=4", f"--ckpt_path={OLD / 'sharded.ckpt'}")
    assert cli.trainer.global_step == 4
