"""Answers of vLLM: the prompts that training saw, the answers that transformers gives."""

import json

import pytest
from peft import LoraConfig, PromptEncoderConfig

from lit_alignment import SFTModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.errors import ConfigError
from lit_alignment.generation.engine import Request
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.vllm import engine as vllm_engine
from tests.helpers import chats, sft_data, sft_module
from tests.vllm.helpers import FAST, by_transformers, by_vllm, lines, same_answers, trained

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
GREEDY = {"greedy": DecodingConfig(max_new_tokens=12, logprobs=True)}


def lora(base, rank=4, **settings):
    peft = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTModule(BackboneConfig(base), peft, optimizer=FAST, **{"generation": GREEDY, **settings})


def full(base, **settings):
    return SFTModule(BackboneConfig(base), optimizer=FAST, **{"generation": GREEDY, **settings})


def test_trained_model_answers_as_with_transformers(tmp_path, base):
    module = full(base)
    checkpoint = trained(tmp_path, module, sft_data(module, chats(8), chats(6, seed=1)))
    runs = []
    for run in (by_transformers, by_vllm):
        module = full(base)
        runs.append(lines(run(tmp_path, module, sft_data(module, [], chats(6, seed=1)), checkpoint), "greedy"))
    same_answers(*runs)


def test_prompt_ids_are_those_of_training_with_one_bos(tmp_path, base, monkeypatch):
    """The same list in training, in transformers and in vLLM."""
    module = full(base)
    module.tokenizer.bos_token = "<|im_start|>"
    data = sft_data(module, chats(4), chats(4))
    checkpoint = trained(tmp_path, module, data)
    seen = {}
    original = vllm_engine.VLLMEngine._result

    def spy(self, request, output):
        seen.setdefault("ours", []).append(list(request.token_ids))
        seen.setdefault("vllm", []).append(list(output.prompt_token_ids))
        return original(self, request, output)

    monkeypatch.setattr(vllm_engine.VLLMEngine, "_result", spy)
    by_vllm(tmp_path, module, data, checkpoint)
    assert sorted(seen["vllm"]) == sorted(seen["ours"]) and len(seen["vllm"]) == 4
    for row in data.examples["predict"]:
        assert row["input_ids"] in seen["vllm"]
        whole = next(each for each in data.examples["train"] if each["id"] == row["id"])["input_ids"]
        assert whole[: len(row["input_ids"])] == row["input_ids"]
        assert row["input_ids"][:2].count(module.tokenizer.bos_token_id) == 1


def test_adapter_is_served_beside_its_base(tmp_path, base, capsys):
    checkpoint = trained(tmp_path, module := lora(base), sft_data(module, chats(8), chats(6)), steps=4)
    runs = []
    for run in (by_transformers, by_vllm):
        runs.append(lines(run(tmp_path, module := lora(base), sft_data(module, [], chats(6)), checkpoint), "greedy"))
    same_answers(*runs)
    assert "LoRA adapter beside its base" in capsys.readouterr().out


def test_rows_of_new_tokens_are_merged_and_it_is_said(tmp_path, base, capsys):
    def module():
        return lora(base, tokens=TokensConfig(new={"<mark>": NewTokenConfig()}))

    records = [{**each, "messages": [{"role": "system", "content": "<mark>"}, *each["messages"]]} for each in chats(6)]
    checkpoint = trained(tmp_path, first := module(), sft_data(first, records, records), steps=4)
    runs = []
    for run in (by_transformers, by_vllm):
        runs.append(lines(run(tmp_path, each := module(), sft_data(each, [], records), checkpoint), "greedy"))
    same_answers(*runs)
    assert "merged, since it holds rows of new tokens" in capsys.readouterr().out


def test_base_model_answers_before_training(tmp_path, base):
    runs = []
    for run in (by_transformers, by_vllm):
        runs.append(lines(run(tmp_path, module := lora(base), sft_data(module, [], chats(3))), "greedy"))
    same_answers(*runs)


def test_stop_strings_draws_and_special_tokens(tmp_path, base):
    plain = full(base)
    whole = lines(by_vllm(tmp_path / "whole", plain, sft_data(plain, [], chats(1))), "greedy")[0]["answers"][0]
    middle = whole["content"][len(whole["content"]) // 2 :][:3]
    settings = {
        "stopped": DecodingConfig(max_new_tokens=12, stop_strings=[middle]),
        "drawn": DecodingConfig(max_new_tokens=6, temperature=1.0, num_return_sequences=3, seed=7),
    }
    found = []
    for name in ("first", "second"):
        module = full(base, generation=settings)
        found.append(by_vllm(tmp_path / name, module, sft_data(module, [], chats(3))))
    stopped = lines(found[0], "stopped")[0]["answers"][0]
    assert stopped["content"] == whole["content"][: whole["content"].index(middle)]
    assert stopped["finish_reason"] == "stop" and whole["finish_reason"] == "length"
    drawn = [lines(folder, "drawn") for folder in found]
    assert drawn[0] == drawn[1]  # a resumed run draws the same
    assert all(len({answer["content"] for answer in line["answers"]}) == 3 for line in drawn[0])


def test_prompt_that_is_too_long_is_reported_and_the_rest_go_on(tmp_path, base, capsys):
    records = chats(4)
    records[2]["messages"] = [{"role": "user", "content": "order " * 300}, {"role": "assistant", "content": "x"}]
    module = full(base)
    data = sft_data(module, [], records, encoding=EncodingConfig(max_length=1024))
    folder = by_vllm(tmp_path, module, data, max_model_len=200)
    assert {line["id"] for line in lines(folder, "greedy")} == {"r0", "r1", "r3"}
    (failed,) = lines(folder, "failed")
    assert failed["id"] == "r2" and "200" in failed["problem"]
    assert "warning: 1 prompts have no answer" in capsys.readouterr().out
    module = full(base)
    data = sft_data(module, [], records, encoding=EncodingConfig(max_length=1024))
    with pytest.raises(ConfigError, match=r"made with other settings \(engine: .*'max_model_len': 200.* there"):
        by_vllm(tmp_path, module, data, max_model_len=512)


def test_requests_are_drawn_as_there_is_room(base, tokenizer):
    """The window bounds what is open, and is refilled before each step."""
    arguments = vllm_engine.engine_arguments(
        {"model": base, "dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    )
    engine = vllm_engine.VLLMEngine(arguments, tokenizer)
    drawn, open_ones = 0, []

    def requests():
        nonlocal drawn
        for number in range(20):
            drawn += 1
            yield Request([number + 5], DecodingConfig(max_new_tokens=1 + number % 5), owner=number)

    finished = []
    for request, (completion,) in engine.stream(requests()):
        assert completion.num_tokens == 1 + request.owner % 5 and completion.finish_reason == "length"
        finished.append(request.owner)
        open_ones.append(drawn - len(finished))
    engine.close()
    assert sorted(finished) == list(range(20))
    assert max(open_ones) <= engine.window == 4 and min(open_ones[:10]) >= 2  # as many as are computed at once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_length": 5}, r"vllm.max_model_length: .* did you mean 'max_model_len'\?"),
        ({"dtype": "float33"}, "vllm: argument --dtype: invalid choice: 'float33'"),
        ({"model": "x"}, "vllm.model follows from the rest"),
        ({"quantization": "nothing"}, "vLLM cannot start with|vllm: argument"),
    ],
)
def test_wrong_argument_is_named(tmp_path, base, settings, message):
    module = full(base)
    with pytest.raises(ConfigError, match=message):
        by_vllm(tmp_path, module, sft_data(module, [], chats(2)), **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generation": {"beams": DecodingConfig(num_beams=2)}}, "vLLM has no beam search"),
        ({"peft": PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}, "PromptEncoderConfig are not"),
        ({"tokens": TokensConfig(new={"<mark>": NewTokenConfig()})}, "rows of new tokens are not trained"),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path, base, given, message):
    module = full(base, **given)
    with pytest.raises(ConfigError, match=message):
        by_vllm(tmp_path, module, sft_data(module, [], chats(2)))


def test_random_weights_are_refused(tmp_path):
    module = sft_module()
    with pytest.raises(ConfigError, match="backbone.weights is random. Give --ckpt_path"):
        by_vllm(tmp_path, module, sft_data(module, [], chats(2)))


def test_answers_of_another_engine_are_not_gone_on_with(tmp_path, base):
    module = full(base)
    folder = by_transformers(tmp_path, module, sft_data(module, [], chats(2)))
    folder.rename(tmp_path / "vllm")
    assert "engine" not in json.loads((tmp_path / "vllm/greedy.settings.json").read_text())
    module = full(base)
    with pytest.raises(ConfigError, match="engine: None there, .*vllm"):
        by_vllm(tmp_path, module, sft_data(module, [], chats(2)))
