"""Scores of vLLM are those of transformers, raw, and refused where they are not."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_alignment.errors import ConfigError
from lit_alignment.vllm.model import served_model
from tests.helpers import class_data, classifier, labelled, pairs, reward_data, reward_model
from tests.vllm.helpers import by_transformers, by_vllm, lines, trained

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
def test_probabilities_are_those_of_transformers(tmp_path, base, lora, problem):
    records = labelled(20)
    if problem == "multi_label":
        records = [{**record, "label": [record["label"]]} for record in records]
    module = classifier(base, lora, problem=problem)
    checkpoint = trained(tmp_path, module, class_data(module, records, records), steps=4)
    runs = []
    for run in (by_transformers, by_vllm):
        each = classifier(base, lora, problem=problem)
        runs.append(lines(run(tmp_path, each, class_data(each, None, records), checkpoint), "classes"))
    assert [line["id"] for line in runs[0]] == [line["id"] for line in runs[1]]
    for one, other in zip(*runs, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    values = [value for line in runs[0] for value in line["probabilities"].values()]
    assert max(values) - min(values) > 0.02


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rewards_are_raw_and_those_of_transformers(tmp_path, base, lora, capsys):
    records = pairs(20)
    module = reward_model(base, lora)
    checkpoint = trained(tmp_path, module, reward_data(module, records, records), steps=8)
    runs = []
    for run in (by_transformers, by_vllm):
        each = reward_model(base, lora)
        runs.append(lines(run(tmp_path, each, reward_data(each, None, records), checkpoint), "rewards"))
    for one, other in zip(*runs, strict=True):
        assert one["id"] == other["id"] and one["rewards"] == pytest.approx(other["rewards"], abs=1e-4)
    values = [value for line in runs[1] for value in line["rewards"].values()]
    assert min(values) < 0 or max(values) > 1  # a sigmoid would be between
    assert "raw scores of 8 records differ from transformers' by at most" in capsys.readouterr().out


def test_other_scores_are_refused_before_anything_is_written(tmp_path, base):
    records = pairs(6)
    module = reward_model(base)
    checkpoint = trained(tmp_path, module, reward_data(module, records, records))
    folder = served_model(tmp_path / "trained.ckpt").trained_folder
    state = load_file(folder / "model.safetensors")
    state["score.weight"] = state["score.weight"] + 0.1 * torch.randn(state["score.weight"].shape)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    module = reward_model(base)
    with pytest.raises(ConfigError, match="vLLM scores otherwise than transformers: a raw score"):
        by_vllm(tmp_path, module, reward_data(module, None, records), checkpoint)
    assert not list((tmp_path / "vllm").glob("rewards.jsonl*"))


def test_exported_reward_model_is_served_as_it_stands(tmp_path, base):
    records = pairs(4)
    module = reward_model(base)
    trained(tmp_path, module, reward_data(module, records, records), steps=4)
    folder = served_model(tmp_path / "trained.ckpt").trained_folder
    runs = []
    for run in (by_transformers, by_vllm):
        each = reward_model(str(folder))
        runs.append(lines(run(tmp_path, each, reward_data(each, None, records)), "rewards"))
    assert [line["rewards"] for line in runs[0]] == [pytest.approx(line["rewards"], abs=1e-4) for line in runs[1]]


def test_untrained_head_is_refused(tmp_path, base):
    module = reward_model(base)
    with pytest.raises(ConfigError, match="the head is not trained. Give --ckpt_path"):
        by_vllm(tmp_path, module, reward_data(module, None, pairs(2)))


def test_rewards_of_steps_are_refused(tmp_path, base):
    record = {"id": "a", "prompt": "q", "steps": ["one", "two"], "labels": [1, 0]}
    module = reward_model(base)
    settings = {"kind": "steps", "step_separator": "\n\n"}
    checkpoint = trained(tmp_path, module, reward_data(module, [record], **settings))
    module = reward_model(base)
    with pytest.raises(ConfigError, match="rewards of steps are read inside a response"):
        by_vllm(tmp_path, module, reward_data(module, None, [record], **settings), checkpoint)
