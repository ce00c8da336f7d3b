"""Reward models: what is compared, shared, weighed, measured, saved and predicted."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from lit_alignment import CherryPicks, PredictionWriter, RewardModule, ScoredPicks
from lit_alignment.callbacks.export import export_checkpoint
from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.generation.reward_scorer import RewardScorer
from lit_alignment.losses import bradley_terry_loss, outcome_loss, plackett_luce_loss
from lit_alignment.models.head import base_model, output_head
from lit_alignment.models.loading import BackboneConfig
from tests.helpers import (
    assert_same_gradients,
    base_model_folder,
    chats,
    pairs,
    reward_data,
    reward_model,
    sft_data,
    sft_module,
    step_gradients,
    trainer,
)
from tests.helpers.adapters import PROMPTS

PROMPT = {"prompt": "order the kitchen scale"}
RANKING = PROMPT | {"candidates": ["yes please", "no", "repair it now"], "ranking": [2, 3, 1]}
STEPS = PROMPT | {"steps": ["first the scale", "then the kitchen", "done"], "labels": [1, True, 0]}
OUTCOMES = [PROMPT | {"id": str(i), "completion": text, "label": i % 2} for i, text in enumerate(["bad", "good", "no"])]


def whole(model, prompt, response):
    """Score of one conversation by transformers' own forward pass, alone in its batch."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = model.tokenizer.apply_chat_template(messages, return_dict=False)
    return model.network(input_ids=torch.tensor([ids])).logits[0, 0]


def first_batch(data, stage="predict"):
    data.setup(stage)
    return next(iter({"predict": data.predict_dataloader, "validate": data.val_dataloader}[stage]()))


@pytest.mark.parametrize(
    "settings", [{}, {"share_prompts": False}, {"packing": False}], ids=["shared", "packed", "padded"]
)
def test_score_is_that_of_a_conversation_alone_in_its_batch(settings):
    records = pairs(8)
    model = reward_model()
    model.load_model().eval()
    batch = first_batch(reward_data(model, val=records, **settings))
    with torch.no_grad():
        found = {item.id: rewards for item, rewards in zip(batch.items, model.rewards(batch.scores), strict=True)}
        for record in records:
            expected = [whole(model, record["prompt"], record[name]) for name in ("chosen", "rejected")]
            torch.testing.assert_close(found[record["id"]], torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_sharing_reads_each_prompt_once():
    model = reward_model()
    shared, apart = (reward_data(model, val=pairs(8), share_prompts=share) for share in (True, False))
    tokens = {name: first_batch(data).scores.num_tokens for name, data in (("shared", shared), ("apart", apart))}
    prompts = sum(len(item.sequences.prompt) for item in first_batch(shared).items)
    assert tokens["apart"] - tokens["shared"] == prompts > 0
    assert shared.examples["predict"]["length"] != apart.examples["predict"]["length"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("settings", [{}, {"packing": False, "batch_size": 2}], ids=["shared", "padded"])
def test_accumulation_equals_one_big_batch(settings, lora, tmp_path):
    path = base_model_folder(tmp_path / "base") if lora else "configs/tiny"
    model = reward_model(path, lora, center=0.01)
    one = reward_data(model, pairs(9), packing=settings.get("packing", True), batch_size=9, tokens_per_batch=8192)
    expected = step_gradients(tmp_path, model, one)
    model = reward_model(path, lora, center=0.01)
    many = reward_data(model, pairs(9), **{"tokens_per_batch": 512, **settings})
    found = step_gradients(tmp_path, model, many, accumulate_grad_batches=9)
    assert any("score" in name for name in found)
    assert_same_gradients(found, expected)


def test_gradient_equals_a_slow_loop_over_single_pairs(tmp_path):
    model = reward_model(center=0.1)
    found = step_gradients(tmp_path, model, reward_data(model, pairs(5), tokens_per_batch=8192))
    model = reward_model()
    model.load_model()
    total = torch.zeros(())
    for record in pairs(5):
        chosen, rejected = (whole(model, record["prompt"], record[name])[None] for name in ("chosen", "rejected"))
        total = total + bradley_terry_loss(chosen, rejected, torch.tensor([record["margin"]])).sum()
        total = total + 0.1 * (chosen + rejected).square().sum()
    (total / 5).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def loss_of(model, folder, records, **settings):
    (result,) = trainer(folder).validate(model, reward_data(model, val=records, **settings), verbose=False)
    return result


def test_margin_can_be_left_out(tmp_path):
    records = [record | {"margin": 3.0} for record in pairs(4)]
    losses = [loss_of(reward_model(use_margin=use), tmp_path, records)["val/loss"] for use in (True, False)]
    assert losses[0] > losses[1] + 1


def test_ranking_trains_plackett_luce(tmp_path):
    model = reward_model()
    result = loss_of(model, tmp_path, [RANKING])
    model.eval()
    scores = torch.stack([whole(model, RANKING["prompt"], text) for text in RANKING["candidates"]])
    assert result["val/loss"] == pytest.approx(float(plackett_luce_loss(scores, torch.tensor([2, 3, 1]))), rel=1e-5)
    best, second, worst = scores[2], scores[0], scores[1]
    hits = [float(best > second), float(best > worst), float(second > worst)]
    assert result["val/accuracy"] == pytest.approx(sum(hits) / 3)
    assert result["val/margin"] == pytest.approx(float(2 * best - 2 * worst) / 3, rel=1e-4)


def test_outcomes_train_binary_cross_entropy(tmp_path):
    model = reward_model()
    result = loss_of(model, tmp_path, OUTCOMES, kind="outcomes")
    model.eval()
    scores = torch.stack([whole(model, r["prompt"], r["completion"]) for r in OUTCOMES])
    expected = outcome_loss(scores, torch.tensor([0, 1, 0])).mean()
    assert result["val/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert {"val/accuracy", "val/auroc", "val/calibration_error", "val/reward_mean"} <= result.keys()


def test_outcomes_of_one_label_have_no_area_under_the_roc_curve(tmp_path):
    """It was 0, as of a model that is always wrong."""
    bad = [outcome | {"label": 0} for outcome in OUTCOMES]
    found = loss_of(reward_model(), tmp_path, bad, kind="outcomes").keys()
    assert "val/accuracy" in found and not found & {"val/auroc", "val/average_precision"}


def test_steps_are_scored_where_their_separators_end(tmp_path):
    model = reward_model()
    model.load_model().eval()
    batch = first_batch(reward_data(model, val=[STEPS], kind="steps", step_separator="\n"))
    ids = batch.scores.input_ids[0]
    for place, text in zip(batch.scores.read_at.tolist(), ("scale\n", "kitchen\n", "done\n"), strict=True):
        assert model.tokenizer.decode(ids[: place + 1]).endswith(text)
    (rewards,) = model.rewards(batch.scores)
    for place, reward in zip(batch.scores.read_at.tolist(), rewards, strict=True):
        prefix = model.network(input_ids=ids[None, : place + 1]).logits[0, 0]
        torch.testing.assert_close(reward, prefix, rtol=1e-5, atol=1e-5)
    result = loss_of(reward_model(), tmp_path, [STEPS], kind="steps", step_separator="\n")
    assert result["val/loss"] == pytest.approx(float(outcome_loss(rewards, torch.tensor([1, 1, 0])).mean()), rel=1e-5)


def test_every_step_weighs_the_same_under_any_batching(tmp_path):
    short = PROMPT | {"id": "short", "steps": ["scale"], "labels": [0]}
    found = []
    for settings in ({"tokens_per_batch": 8192}, {"packing": False, "batch_size": 1}):
        model = reward_model()
        data = reward_data(model, [STEPS | {"id": "long"}, short], kind="steps", **settings)
        found.append(step_gradients(tmp_path, model, data, accumulate_grad_batches=2))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("kind", ["preferences", "outcomes", "steps"])
@pytest.mark.slow
def test_every_kind_of_record_can_be_learned(kind, tmp_path):
    records = {"preferences": [*pairs(4), RANKING | {"id": "k"}], "outcomes": OUTCOMES, "steps": [STEPS]}[kind]
    model = reward_model(use_margin=False)
    data = reward_data(model, records, records, kind=kind, step_separator="\n")
    runner = trainer(tmp_path, max_epochs=40)
    runner.fit(model, data)
    assert float(runner.callback_metrics["val/accuracy"]) == 1
    assert float(runner.callback_metrics["val/loss"]) < 0.2


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_head_is_saved_with_the_adapters_and_scores_stay(form, tmp_path):
    base = base_model_folder(tmp_path / "base")
    model = reward_model(base, lora=True)
    data = reward_data(model, pairs(6), pairs(4, seed=1))
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    trainer(tmp_path, callbacks=[saver], max_epochs=2, enable_checkpointing=True).fit(model, data)
    batch = first_batch(data).scores
    model.eval()
    with torch.no_grad():
        before = model.scores(batch)
        again = reward_model(base, lora=True)
        again.model, _ = restore(read_saved(tmp_path / "ckpt/x.ckpt"))
        torch.testing.assert_close(again.scores(batch), before, rtol=1e-5, atol=1e-5)
        folder = export_checkpoint(model, tmp_path / "ckpt/x.ckpt", tmp_path / form, form)
        exported = RewardModule(BackboneConfig(str(folder))) if form == "merged" else restored(folder)
        if form == "merged":
            exported.load_model(packing=True, shared_prompts=True).eval()
        torch.testing.assert_close(exported.scores(batch), before, rtol=1e-5, atol=1e-5)
    assert exported.head.measured == model.head.measured and model.head.measured.keys() == {"reward_mean", "reward_std"}


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_learned_vectors_before_the_tokens_score_the_same_in_any_batch_and_after_saving(name, tmp_path):
    base = base_model_folder(tmp_path / "base")
    model = reward_model(base, peft=PROMPTS[name])
    data = reward_data(model, pairs(6), pairs(4), packing=False, batch_size=4)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    trainer(tmp_path, callbacks=[saver], max_epochs=2, enable_checkpointing=True).fit(model, data)
    batch = first_batch(data)
    model.eval()
    with torch.no_grad():
        together = torch.cat(model.rewards(batch.scores))
        alone = torch.cat([model.rewards(data.predict_collate([item]).scores)[0] for item in batch.items])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        folder = export_checkpoint(model, tmp_path / "ckpt/x.ckpt", tmp_path / "out")
        saved = read_saved(folder)
        again = RewardModule(saved.backbone, adapter=saved.adapter)
        again.load_model().eval()
        torch.testing.assert_close(torch.cat(again.rewards(batch.scores)), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_head_is_in_float32_over_a_decoder_in_bfloat16(lora, tmp_path):
    path = base_model_folder(tmp_path / "base")
    model = reward_model(path, lora, backbone=BackboneConfig(path, dtype="bfloat16"))
    network = model.load_model(packing=True).eval()
    assert base_model(network).get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in output_head(network).parameters()} == {torch.float32}
    batch = first_batch(reward_data(model, val=pairs(2)))
    assert model.scores(batch.scores).dtype == torch.float32


def test_reports_are_refused_where_they_do_not_belong(tmp_path):
    model = reward_model()
    with pytest.raises(ConfigError, match="CherryPicks needs a module that answers prompts, not RewardModule"):
        trainer(tmp_path, callbacks=[CherryPicks()]).fit(model, reward_data(model, pairs(2), pairs(2)))
    module = sft_module()
    with pytest.raises(ConfigError, match="ScoredPicks needs a classifier or a reward model, not SFTModule; .*Cherry"):
        trainer(tmp_path, callbacks=[ScoredPicks()]).fit(module, sft_data(module, chats(2), chats(2)))


def test_prefix_tuning_of_a_head_is_refused(tmp_path):
    model = reward_model(base_model_folder(tmp_path / "base"), peft=PROMPTS["prefix"])
    with pytest.raises(ConfigError, match="model.peft: prefix tuning hands keys and values"):
        model.load_model()


def test_weights_of_another_architecture_are_refused(tmp_path):
    folder = base_model_folder(tmp_path / "base")
    weights = load_file(f"{folder}/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights of LlamaForSequenceClassification are not there, the first is"):
        reward_model(folder).load_model()


def restored(folder):
    saved = read_saved(folder)
    module = RewardModule(saved.backbone, adapter=saved.adapter)
    module.load_model(packing=True, shared_prompts=True).eval()
    return module


def test_exported_model_scores_the_same_in_other_programs(tmp_path):
    model = reward_model()
    data = reward_data(model, pairs(4), pairs(4))
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(model, data)
    folder = export_checkpoint(model, tmp_path / "ckpt/x.ckpt", tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.num_labels == 1 and loaded.config.reward_std == model.head.measured["reward_std"]
    messages = [{"role": "user", "content": "repair"}, {"role": "assistant", "content": "yes"}]
    model.eval()
    assert RewardScorer(str(folder))([messages]) == pytest.approx([float(whole(model, "repair", "yes"))], abs=1e-5)


def predict(model, records, folder, **settings):
    data = reward_data(model, val=records, **settings)
    trainer(folder, callbacks=[PredictionWriter(str(folder / "out"), overwrite=True)]).predict(model, data)
    return [json.loads(line) for line in (folder / "out/rewards.jsonl").read_text().splitlines()]


def test_predict_writes_rewards_of_pairs_and_of_sampled_answers_by_their_ids(tmp_path):
    sampled = {
        "id": "s", "messages": [{"role": "user", "content": "repair"}], "label": "l", "meta": {"a": 1},
        "answers": [{"id": 7, "content": "yes"}, {"id": "b", "content": "no please"}],
    }  # fmt: skip
    model = reward_model()
    pair, answers = predict(model, [pairs(1)[0], sampled], tmp_path)
    model.eval()
    assert list(answers["rewards"]) == ["7", "b"] == [answer["id"] for answer in answers["answers"]]
    assert answers["rewards"]["b"] == pytest.approx(float(whole(model, "repair", "no please")), abs=1e-5)
    assert answers["label"] == "l" and answers["meta"] == {"a": 1}
    assert pair["rewards"].keys() == {"chosen", "rejected"} and pair["messages"][0]["content"] == pairs(1)[0]["prompt"]
    again = predict(reward_model(), [answers | {"id": "again"}], tmp_path / "2")  # what was written can be read
    assert again[0]["rewards"] == pytest.approx(answers["rewards"], abs=1e-5)


def test_empty_answer_is_scored_and_loses_no_other_one(tmp_path):
    sampled = {"id": "s", "messages": [{"role": "user", "content": "repair"}]}
    sampled["answers"] = [{"id": "a", "content": "yes"}, {"id": "b", "content": ""}]
    for number, end in enumerate(("turn", "none")):
        model = reward_model()
        encoding = EncodingConfig(max_length=64, end_of_turn=end)
        (line,) = predict(model, [sampled], tmp_path / str(number), encoding=encoding)
        model.eval()
        assert line["rewards"]["a"] == pytest.approx(float(whole(model, "repair", "yes")), abs=1e-5)
        assert line["rewards"]["b"] == pytest.approx(float(whole(model, "repair", "")), abs=1e-5)


def test_reward_of_steps_is_the_log_probability_that_all_are_good(tmp_path):
    (line,) = predict(reward_model(), [STEPS], tmp_path, kind="steps", step_separator="\n")
    expected = torch.nn.functional.logsigmoid(torch.tensor(line["step_rewards"])).sum()
    assert len(line["step_rewards"]) == 3 and line["rewards"] == pytest.approx({"0": float(expected)}, abs=1e-5)


def test_reward_of_one_step_is_a_log_probability_too(tmp_path):
    one = PROMPT | {"id": "one", "steps": ["yes please"]}
    (line,) = predict(reward_model(), [one], tmp_path, kind="steps", step_separator="\n")
    (logit,) = line["step_rewards"]
    expected = torch.nn.functional.logsigmoid(torch.tensor(logit))
    assert line["rewards"] == pytest.approx({"0": float(expected)}, abs=1e-5)


def test_steps_are_not_scored_as_whole_responses(tmp_path):
    with pytest.raises(RecordError, match="field 'steps' is there, which data.kind: preferences does not take"):
        predict(reward_model(), [STEPS], tmp_path)


def test_normalised_rewards_have_the_validation_data_s_mean_and_deviation(tmp_path):
    model = reward_model()
    data = reward_data(model, pairs(6), pairs(5, seed=1))
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(model, data)
    again = reward_model(normalize=True)
    runner = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "out"))])
    runner.predict(again, reward_data(again, val=pairs(5, seed=1)), ckpt_path=tmp_path / "ckpt/x.ckpt")
    lines = [json.loads(line) for line in (tmp_path / "out/rewards.jsonl").read_text().splitlines()]
    rewards = torch.tensor([reward for line in lines for reward in line["rewards"].values()])
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-4)
    assert float(rewards.std(correction=0)) == pytest.approx(1, abs=1e-4)
    fresh = reward_model(normalize=True)
    with pytest.raises(ConfigError, match="this model's rewards were never measured"):
        trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "new"))]).predict(
            fresh, reward_data(fresh, val=pairs(2))
        )


def test_rewards_of_steps_are_not_normalised(tmp_path):
    with pytest.raises(ConfigError, match="model.normalize: the reward of steps is a log-probability"):
        predict(reward_model(normalize=True), [STEPS], tmp_path, kind="steps", step_separator="\n")


def test_benchmark_is_reported_by_subset_and_by_section(tmp_path):
    names = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-go"]
    records = [r | {"subset": names[i % 5]} for i, r in enumerate(pairs(15))]
    model = reward_model()
    (result,) = trainer(tmp_path).test(model, reward_data(model, val=records), verbose=False)
    sections = [result[f"test/section/{name}"] for name in ("Chat", "Chat Hard", "Safety", "Reasoning")]
    assert sections[0] == result["test/accuracy/alpacaeval-easy"]
    assert sections[3] == pytest.approx((result["test/accuracy/math-prm"] + result["test/accuracy/hep-go"]) / 2)
    assert result["test/section/RewardBench"] == pytest.approx(sum(sections) / 4)
    assert result["test/accuracy"] == pytest.approx(sum(result[f"test/accuracy/{name}"] for name in names) / 5)


def test_record_longer_than_a_row_has_a_row_of_its_own():
    model = reward_model()
    many = PROMPT | {"candidates": [f"{'scale ' * 20}{i}" for i in range(8)], "ranking": list(range(8))}
    data = reward_data(model, val=[many, *pairs(2)], encoding=EncodingConfig(max_length=300), tokens_per_batch=300)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert max(batch.num_tokens for batch in batches) > 300
    assert data.tokens_per_batch == 300  # planning changes no other row, and no other split
    assert [batch.ids for batch in batches if batch.num_tokens > 300] == [["val/0"]]
    assert sorted(name for batch in batches for name in batch.ids) == ["val/0", "val/r0", "val/r1"]


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("outcomes", pairs(1)[0], "the record has 2 response.s., which data.kind: outcomes does not take"),
        ("preferences", OUTCOMES[0], "the record has 1 response.s., which data.kind: preferences does not take"),
        ("steps", pairs(1)[0], "field 'labels' is missing"),
        ("preferences", {k: v for k, v in RANKING.items() if k != "ranking"}, "field 'ranking' is missing"),
        ("outcomes", {k: v for k, v in OUTCOMES[0].items() if k != "label"}, "field 'label' is missing"),
    ],
)
def test_record_of_another_kind_is_refused(kind, record, message):
    data = reward_data(reward_model(), [record], kind=kind)
    with pytest.raises(RecordError, match=message):
        data.setup("fit")


def test_pair_that_says_nothing_is_dropped_with_its_reason():
    same = PROMPT | {"id": "same", "chosen": "yes", "rejected": "yes"}
    tied = PROMPT | {"id": "tied", "candidates": ["a", "b"], "ranking": [1, 1]}
    sampled = PROMPT | {"id": "sampled", "answers": [{"id": "a", "content": "yes"}], "rewards": {"a": 1.0}}
    data = reward_data(reward_model(), [same, tied, sampled, *pairs(1)])
    data.setup("fit")
    assert data.reports["train"].dropped == {"nothing_to_prefer": 3}


def test_report_shows_both_responses_and_their_scores(tmp_path):
    model = reward_model()
    runner = trainer(tmp_path, callbacks=[ScoredPicks(num_samples=2)])
    runner.fit(model, reward_data(model, pairs(4), [pairs(1)[0], RANKING]))
    page = (tmp_path / "report.html").read_text()
    assert "right" in page and "0: yes please" in page
    lines = [json.loads(line) for line in (tmp_path / "cherry_picks.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {"chosen", "rejected"} <= lines[0]["scores"].keys()


@pytest.mark.parametrize(
    ("record", "rewards", "right"),
    [
        (pairs(1)[0], [2.0, 1.0], True),
        (pairs(1)[0], [1.0, 2.0], False),
        (RANKING, [0.0, 1.0, 2.0], True),  # the third has rank 1
        (RANKING, [2.0, 0.0, 1.0], False),
        (OUTCOMES[0], [2.0], None),  # nothing to compare
    ],
)
def test_sample_is_right_where_the_best_response_has_the_highest_reward(record, rewards, right):
    model = reward_model()
    kind = "outcomes" if record is OUTCOMES[0] else "preferences"
    item = reward_data(model, kind=kind).predict_items([SourceConfig(records=[record])])[0]
    names = [answer["id"] for answer in item.answers]
    sample = model.scored_sample(item, {"rewards": dict(zip(names, rewards, strict=True))})
    assert sample.right is right and sample.columns["score"] is right and list(sample.scores.values()) == rewards
