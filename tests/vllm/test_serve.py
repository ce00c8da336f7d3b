"""The server: vLLM's own, on what training has made."""

import json
import subprocess
import sys

import pytest
from peft import LoraConfig

from lit_alignment import SFTModule
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.tools.serve import command
from lit_alignment.vllm.model import Served
from tests.helpers import ROOT, pairs, reward_data, reward_model, sft_data
from tests.vllm.helpers import FAST, by_transformers, lines, serving, trained


def test_server_listens_on_this_machine_alone_by_default(tmp_path):
    (tmp_path / "generation_config.json").write_text("{}")
    words = command(Served(str(tmp_path)), "mine", "127.0.0.1", 8000)
    assert words[:6] == ["--model", str(tmp_path), "--host", "127.0.0.1", "--port", "8000"]
    assert words[-2:] == ["--generation-config", str(tmp_path)]


def test_rewards_are_served_raw(tmp_path):
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = command(Served(str(tmp_path)), "mine", "127.0.0.1", 8000)
    assert words[words.index("--pooler-config") + 1] == '{"use_activation": false}'


@pytest.mark.vllm
@pytest.mark.slow
def test_client_gets_the_answers_of_predict(tmp_path, base):
    """An adapter with its base, the template and the stop tokens of training, and a key."""
    import openai

    def module():
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        settings = {"greedy": DecodingConfig(max_new_tokens=16)}
        return SFTModule(BackboneConfig(base), peft, optimizer=FAST, generation=settings)

    records = [
        {"id": str(n), "messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for n, word in enumerate(["scale", "kitchen", "order"])
    ]
    checkpoint = trained(tmp_path, first := module(), sft_data(first, records, records), steps=60)
    expected = lines(by_transformers(tmp_path, m := module(), sft_data(m, [], records), checkpoint), "greedy")
    assert [line["answers"][0]["content"] for line in expected] == ["scale", "kitchen", "order"]
    with serving(checkpoint, "--name", "mine", "--api-key", "secret") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert "mine" in [model.id for model in client.models.list()]
        for record, line in zip(records, expected, strict=True):
            asked = {"model": "mine", "messages": record["messages"][:1], "temperature": 0}
            choice = client.chat.completions.create(**asked, max_tokens=16).choices[0]
            assert choice.message.content == line["answers"][0]["content"]
            assert choice.finish_reason == line["answers"][0]["finish_reason"] == "stop"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()


@pytest.mark.vllm
@pytest.mark.slow
def test_served_rewards_are_those_of_predict(tmp_path, base):
    import httpx

    records = pairs(4)
    checkpoint = trained(tmp_path, first := reward_model(base), reward_data(first, records, records), steps=8)
    module = reward_model(base)
    data = reward_data(module, None, records)
    expected = lines(by_transformers(tmp_path, module, data, checkpoint), "rewards")
    with serving(checkpoint, "--name", "mine") as address:
        for item, line in zip(data.predict_items(data.sources["predict"]), expected, strict=True):
            for answer, ids in zip(item.answers, module.sequences(item), strict=True):
                asked = {"model": "mine", "input": ids, "task": "classify"}
                reply = httpx.post(f"{address}/pooling", json=asked, timeout=60).json()
                assert reply["data"][0]["data"][0] == pytest.approx(line["rewards"][answer["id"]], abs=1e-4)


@pytest.mark.vllm
@pytest.mark.slow
def test_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    words = [sys.executable, "-m", "lit_alignment", "serve", str(tmp_path / "empty")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "no checkpoint file, sharded checkpoint" in run.stderr
