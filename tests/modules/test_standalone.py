"""Modules without a Trainer: they answer as predict does, from whatever holds a trained model."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PrefixTuningConfig

from lit_alignment import (
    ClassificationModule,
    DecodingConfig,
    PredictionWriter,
    RAGModule,
    RetrieverDataModule,
    RetrieverModule,
    RewardModule,
    SFTModule,
    VLMModule,
)
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import CheckpointError, ConfigError, RecordError
from lit_alignment.models.dual_encoder import RetrieverConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.rollout.config import RolloutConfig
from lit_alignment.tools.export import main as export
from tests.helpers import (
    RETRIEVER,
    base_model_folder,
    chats,
    class_data,
    classifier,
    distillation_data,
    distillation_module,
    encoded_index,
    judged,
    knowledge,
    labelled,
    pairs,
    policy_data,
    policy_module,
    preference_data,
    preference_module,
    rag_data,
    rag_module,
    reward_data,
    reward_model,
    scoring_settings,
    seen,
    sft_data,
    trainer,
    vlm_data,
    vlm_module,
)

SHORT = {"greedy": DecodingConfig(max_new_tokens=12)}
ASKED = chats(5, seed=3)


def trained(folder, module, data, **options):
    """A module after two optimizer steps, its checkpoint, and what predict writes of the validation records."""
    writer = PredictionWriter(str(folder / "predictions"))
    runner = trainer(folder, max_steps=2, limit_val_batches=1, callbacks=[writer], **options)
    runner.fit(module, data)
    path = folder / "trained.ckpt"
    runner.save_checkpoint(path)
    runner.predict(module, data)
    (file,) = (folder / "predictions").glob("*.jsonl")
    return path, [json.loads(line) for line in file.read_text().splitlines()]


def answers(lines):
    return [line["answers"][0]["content"] for line in lines]


def various_base(folder):
    """A base whose answers differ from prompt to prompt."""
    return base_model_folder(folder / "base", initializer_range=0.3)


def of_method(name, base):
    settings = {"generation": SHORT, "optimizer": OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)}
    match name:
        case "sft":
            module = SFTModule(BackboneConfig(base), **settings)
            return module, sft_data(module, chats(8), ASKED)
        case "lora":
            module = SFTModule(**scoring_settings(base, True, settings))
            return module, sft_data(module, chats(8), ASKED)
        case "preference":
            module = preference_module(base, True, **settings)
            return module, preference_data(module, pairs(8), ASKED)
        case "policy":
            module = policy_module(base, True, rollout=RolloutConfig(num_responses=2, max_new_tokens=4), **settings)
            return module, policy_data(module, chats(2), ASKED, batch_size=2)
        case "distillation":
            module = distillation_module(base, True, teacher=BackboneConfig(base), on_policy_share=0.0, **settings)
            return module, distillation_data(module, chats(8), ASKED)


@pytest.mark.parametrize("method", ["sft", "lora", "preference", "policy", "distillation"])
def test_answers_of_a_checkpoint_are_those_of_predict(method, tmp_path):
    module, data = of_method(method, various_base(tmp_path))
    if method == "preference":
        data.sources["val"] = []  # conversations alone are no preferences
    path, lines = trained(tmp_path, module, data)
    loaded = type(module).from_checkpoint(path, device="cpu", generation=SHORT)
    assert loaded.generate(ASKED) == answers(lines)
    assert module.generate(ASKED) == answers(lines)  # with its Trainer, after the training
    assert len(set(answers(lines))) > 1


def test_answers_of_an_adapter_and_of_exports_are_those_of_predict(tmp_path):
    module, data = of_method("lora", various_base(tmp_path))
    path, lines = trained(tmp_path, module, data)
    for form in ("adapter", "merged"):
        export([str(path), "--out", str(tmp_path / form), "--form", form])
        loaded = SFTModule.from_checkpoint(tmp_path / form, device="cpu", generation=SHORT)
        assert loaded.generate(ASKED) == answers(lines)


def test_virtual_tokens_answer_as_in_predict(tmp_path):
    settings = scoring_settings(various_base(tmp_path), False, {"generation": SHORT})
    peft = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    module = SFTModule(**settings | {"peft": peft})
    path, lines = trained(tmp_path, module, sft_data(module, chats(8), ASKED, packing=False))
    assert SFTModule.from_checkpoint(path, device="cpu", generation=SHORT).generate(ASKED) == answers(lines)


@pytest.mark.parametrize(
    "template",
    [
        TemplateConfig(prefix="<{role}>", suffix="</>", role_names={"user": "human"}),
        TemplateConfig(variables={"word": "please"}, file="other.jinja"),
    ],
    ids=["prefix", "variables"],
)
def test_prompts_are_written_as_in_training(template, tmp_path, monkeypatch):
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ word }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant {{ word }}:{% endif %}"
    )
    monkeypatch.chdir(tmp_path)
    module = SFTModule(**scoring_settings(various_base(tmp_path), False, {"generation": SHORT}))
    encoding = EncodingConfig(template=template, ignore_system_prompt=True)
    data = sft_data(module, chats(8), ASKED, encoding=encoding)
    path, _ = trained(tmp_path, module, data)
    (tmp_path / "other.jinja").unlink()
    loaded = SFTModule.from_checkpoint(path, device="cpu")
    asked = [{"role": "system", "content": "urgent"}, {"role": "user", "content": "the scale"}]
    found, expected = loaded.asked([asked])[0], data.whole()
    record = expected.read_prompt({"messages": asked}, "", 0)
    assert found.input_ids == expected.predict_row(record, SourceConfig(path="."))["input_ids"]
    assert loaded.stop == module.stop
    assert "system" not in {message["role"] for message in found.messages}


def test_what_is_asked_changes_nothing(tmp_path):
    module = SFTModule(BackboneConfig(various_base(tmp_path)), generation=SHORT)
    first = module.chat("the scale")  # the weights are loaded for it
    module.network.get_submodule("model.layers.0").eval()
    modes = [layer.training for layer in module.modules()]
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    assert module.chat([{"role": "user", "content": "the scale"}]) == first
    assert module.chat({"messages": [{"role": "user", "content": "the scale"}]}) == first
    assert [layer.training for layer in module.modules()] == modes and torch.is_grad_enabled()
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


def test_model_that_was_asked_is_trained_as_one_that_was_not(tmp_path):
    module = SFTModule(BackboneConfig(various_base(tmp_path)), generation=SHORT)
    module.chat("the scale")
    path, lines = trained(tmp_path, module, sft_data(module, chats(8), ASKED))
    other = SFTModule(BackboneConfig(str(tmp_path / "base")), generation=SHORT)
    (tmp_path / "other").mkdir()
    assert answers(trained(tmp_path / "other", other, sft_data(other, chats(8), ASKED))[1]) == answers(lines)
    loaded = SFTModule.from_checkpoint(path, device="cpu")
    with pytest.raises(ConfigError, match="was loaded to answer"):
        trainer(tmp_path).fit(loaded, sft_data(loaded, chats(8)))


def test_pieces_of_a_response_are_whole_characters_and_together_the_response(tmp_path):
    module, data = of_method("sft", various_base(tmp_path))
    module.chat("the scale")  # of random weights, so that bytes of several characters come
    for seed in range(4):
        decoding = DecodingConfig(max_new_tokens=60, temperature=1.5, seed=seed)
        pieces = []
        whole = module.chat("the scale", decoding, on_text=pieces.append)
        assert "".join(pieces) == whole and len(pieces) > 5
        assert all("\ufffd" not in piece[-1:] for piece in pieces[:-1])
        stop = whole[10:14]
        pieces = []
        cut = module.chat("the scale", replace(decoding, stop_strings=[stop]), on_text=pieces.append)
        assert "".join(pieces) == cut and stop not in cut


def test_nothing_is_shortened_unsaid(tmp_path):
    base = base_model_folder(tmp_path / "base", max_position_embeddings=64)
    module = SFTModule(BackboneConfig(base))
    with pytest.raises(ConfigError, match=r"conversation 2: it has \d+ tokens, and the model 64 positions"):
        module.generate(["the", "scale " * 80])
    found = module.answers(["scale " * 8], DecodingConfig(max_new_tokens=1000))[0].completions[0]
    length = len(module.asked(["scale " * 8])[0].input_ids)
    assert length + found.num_tokens == 64 or found.finish_reason == "stop"


def test_classes_and_scores_are_those_of_predict(tmp_path):
    module = classifier()
    data = class_data(module, labelled(9), labelled(6, seed=4))
    path, lines = trained(tmp_path, module, data)
    loaded = ClassificationModule.from_checkpoint(path, device="cpu")
    texts = [record["messages"][0]["content"] for record in labelled(6, seed=4)]
    for found in (loaded.classify(texts, batch_size=4), module.classify(texts)):
        assert [each["prediction"] for each in found] == [line["prediction"] for line in lines]
        for each, line in zip(found, lines, strict=True):
            assert each["probabilities"] == pytest.approx(line["probabilities"], rel=1e-4)
    assert loaded.temperature == module.temperature != 1.0
    assert all(layer.training for layer in loaded.modules() if "metrics" not in type(layer).__module__)

    (tmp_path / "reward").mkdir()
    module = reward_model()
    data = reward_data(module, judged(9), judged(6, seed=4), kind="outcomes")
    path, lines = trained(tmp_path / "reward", module, data)
    asked = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]
        for r in judged(6, seed=4)
    ]
    rewards = RewardModule.from_checkpoint(path, device="cpu").score(asked)
    assert rewards == pytest.approx([line["rewards"]["0"] for line in lines], rel=1e-4)
    with pytest.raises(RecordError, match="conversation 1"):
        module.score(["no response"])
    with pytest.raises(ConfigError, match="has 2 responses"):
        module.score([pairs(1)[0]])


def test_images_are_seen_as_in_predict(tmp_path):
    module = vlm_module(path=various_base(tmp_path), generation=SHORT)
    asked = seen(tmp_path, 4, seed=1)
    path, lines = trained(tmp_path, module, vlm_data(module, seen(tmp_path, 6), asked))
    loaded = VLMModule.from_checkpoint(path, device="cpu", generation=SHORT)
    assert loaded.generate(asked, batch_size=2) == answers(lines)
    assert module.generate(asked) == answers(lines)


def test_passages_are_retrieved_as_in_predict(tmp_path):
    torch.manual_seed(0)
    index = encoded_index(tmp_path, knowledge(6))
    torch.manual_seed(0)
    module = rag_module(index, generation=SHORT, num_passages=2, train_retriever="none", objective="rag_sequence")
    data = rag_data(module, chats(4), ASKED, query="dialogue")
    path, lines = trained(tmp_path, module, data)
    with pytest.raises(ConfigError, match=r"holds no index. Give it: from_checkpoint\(path, index="):
        RAGModule.from_checkpoint(path, device="cpu")
    torch.manual_seed(0)
    loaded = RAGModule.from_checkpoint(path, device="cpu", index=index, generation=SHORT)
    assert (loaded.num_passages, loaded.data.query) == (2, "dialogue")
    assert loaded.generate(ASKED, batch_size=2) == answers(lines)
    other = RetrieverConfig(base_model_folder(tmp_path / "other", initializer_range=0.3))
    with pytest.raises(ConfigError, match="the index is stale: its passages were encoded with weights"):
        RAGModule.from_checkpoint(path, device="cpu", index=encoded_index(tmp_path / "x", knowledge(6), other))


def test_vectors_of_a_trained_retriever(tmp_path):
    module = RetrieverModule(RETRIEVER)
    questions = [{"query": p.text, "positive": {"title": p.title, "text": p.text}} for p in knowledge(8)]
    data = RetrieverDataModule(module.tokenizer, train=[SourceConfig(records=questions)])
    runner = trainer(tmp_path, max_steps=2)
    runner.fit(module, data)
    runner.save_checkpoint(tmp_path / "trained.ckpt")
    loaded = RetrieverModule.from_checkpoint(tmp_path / "trained.ckpt", device="cpu")
    passages = [{"title": "note", "text": "the scale"}, "urgent order"]
    torch.testing.assert_close(loaded.embed(passages), module.embed(passages))
    expected = module.encoder.queries(["the scale"]).detach()
    torch.testing.assert_close(loaded.embed(["the scale"], kind="query"), expected)


def test_model_of_another_kind_is_refused_with_the_class_that_reads_it(tmp_path):
    module = classifier()
    path, _ = trained(tmp_path, module, class_data(module, labelled(9), labelled(6)))
    with pytest.raises(ConfigError, match="scores conversations: use ClassificationModule or RewardModule, not SFT"):
        SFTModule.from_checkpoint(path)
    with pytest.raises(ConfigError, match="has scores of 3 labels: use ClassificationModule"):
        RewardModule.from_checkpoint(path)
    with pytest.raises(ConfigError, match="answers prompts: use SFTModule"):
        ClassificationModule.from_checkpoint(various_base(tmp_path))
    with pytest.raises(ConfigError, match="no such checkpoint"):
        SFTModule.from_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint file.*adapter_config.json\).$"):
        SFTModule.from_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"Did you mean .*trained.ckpt\?"):
        SFTModule.from_checkpoint(tmp_path)


def test_checkpoint_names_no_file_of_a_template_and_no_limit(tmp_path):
    module, data = of_method("sft", various_base(tmp_path))
    path, _ = trained(tmp_path, module, data)
    content = torch.load(path)
    content["lit_alignment"]["asking"]["encoding"]["template"] |= {"file": "/etc/passwd", "max_characters": 10**12}
    torch.save(content, path)
    loaded = SFTModule.from_checkpoint(path, device="cpu")
    template = loaded.data_as(type(data)).encoding.template
    assert (template.file, template.max_characters) == (None, TemplateConfig.max_characters)
    content["lit_alignment"]["asking"]["encoding"]["max_length"] = "long"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="max_length"):
        SFTModule.from_checkpoint(path, device="cpu")
