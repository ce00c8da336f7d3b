"""Converted configurations run: training, answers, and the merge."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from lit_alignment.cli import main as lit_alignment
from lit_alignment.tools.convert import main
from lit_alignment.trainer_cli import build
from tests.helpers import ROOT, base_model_folder, write_jsonl

CONFIGS = ROOT / "tests/tools/convert/configs"
CHATS = [
    {
        "id": number,
        "source": "unknown keys are ignored",
        "messages": [
            {"role": "user", "content": f"order {number}", "disable_loss": False},
            {"role": "bot", "content": "please reply", "disable_loss": False},
            {"role": "user", "content": "does not work", "disable_loss": False},
            {"role": "assistant", "content": "repair", "disable_loss": False},
        ],
        "label": "urgent",
        "meta": {"number": number},
    }
    for number in range(12)
]


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny random model."""
    return Path(base_model_folder(tmp_path / "base"))


def dataset(tmp_path, **more):
    source = {"name": "chats", "records_path": write_jsonl(tmp_path / "chats.jsonl", CHATS), "sample_rate": 1}
    template = {
        "prefix_template": "<RS>{role}",
        "suffix_template": "</RS>",
        "role_tag_mapping": {"bot": "BOT", "user": "USER", "system": "SYSTEM"},
    }
    return {
        "sources": [source],
        "dataset_type": "chat",
        "prompt_template": template,
        "max_tokens_count": 200,
        **more,
    }


def sft(tmp_path, base, model, trainer, **more):
    """An old configuration of training."""
    return {
        "train_dataset_settings": dataset(tmp_path),
        "val_dataset_settings": dataset(tmp_path),
        "model_settings": {
            "model_path": str(base),
            "model_type": "causal",
            "transformers_settings": {"torch_dtype": "float32"},
            **model,
        },
        "tokenizer_settings": {},
        "special_tokens_settings": {"bos_token": "<s>", "eos_token": "</s>"},
        "trainer_settings": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "eval_steps": 2,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "dataloader_num_workers": 0,
            "no_cuda": True,
            **trainer,
        },
        "wandb_settings": {"project_name": "a", "run_name": "b", "entity": "c", "mode": "disabled"},
        "log_path": str(tmp_path / "run"),
        **more,
    }


def convert(tmp_path, values, name="new.yaml"):
    source = tmp_path / "old.json"
    source.write_text(json.dumps(values))
    target = tmp_path / name
    main([str(source), "--out", str(target)])
    return target


def fit(target):
    return build(["fit", "--config", str(target), "--trainer.enable_progress_bar=false"], run=True).trainer


def predict(target):
    build(["predict", "--config", str(target), "--trainer.accelerator=cpu"], run=True)
    folder = yaml.safe_load(target.read_text())["trainer"]["callbacks"][0]["init_args"]["output_dir"]
    return [json.loads(line) for line in (Path(folder) / "single_inference_0.jsonl").read_text().splitlines()]


def inference(tmp_path, model, **generation):
    """An old configuration of inference."""
    settings = {"max_new_tokens": 8, "do_sample": False, "stop_strings": "</RS>", **generation}
    return {
        "inference_settings": [
            {
                "model_settings": {
                    "model_type": "causal",
                    "transformers_settings": {"torch_dtype": "float32"},
                    **model,
                },
                "tokenizer_settings": {},
                "generation_settings": [{"transformers_settings": settings, "custom_settings": {"batch": 5}}],
            }
        ],
        "dataset_settings": dataset(tmp_path),
        "save_path": str(tmp_path / "answers"),
    }


@pytest.mark.slow
def test_full_training_with_new_tokens_and_picks_then_answers(tmp_path, base):
    picks = {
        "generator_transformers_settings": {"max_new_tokens": 4, "do_sample": False, "stop_strings": "</RS>"},
        "custom_generation_settings": {},
        "dataset_settings": dataset(tmp_path, random_cut=True),
        "metric_settings": [{"type": name, "parameters": {"need_average": [True]}} for name in ("accuracy", "length")],
    }
    tokens = {"<RS>": "<|im_start|>", "</RS>": "order"}
    values = sft(tmp_path, base, {"embeddings_initialization_strategy": tokens}, {}, cherry_pick_settings=picks)
    trainer = fit(convert(tmp_path, values))
    assert trainer.global_step == 6  # 12 conversations, 2 at a time, 2 batches a step, 2 epochs
    assert trainer.lightning_module.tokenizer.tokenize("<RS>USER")[0] == "<RS>"
    assert float(trainer.callback_metrics["val/loss"]) < 6.0
    lines = [json.loads(line) for line in (tmp_path / "run/cherry_picks.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2, 4, 6} and len(lines) == 3 * len(CHATS)
    assert "exact_match" in lines[0]["scores"] and any(name.startswith("length") for name in lines[0]["scores"])
    export = next((tmp_path / "run").rglob("export"))
    answers = predict(convert(tmp_path, inference(tmp_path, {"model_path": str(export)}), "infer.yaml"))
    assert [line["id"] for line in answers] == [str(number) for number in range(12)]
    assert [*(tmp_path / "answers").glob("*.settings.json")] and not (ROOT / "config.yaml").exists()
    assert answers[3]["meta"] == {"number": 3} and answers[3]["label"] == "urgent"


@pytest.mark.slow
def test_lora_then_answers_and_merge_from_its_adapter(tmp_path, base):
    peft = {"name": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    values = sft(tmp_path, base, {"peft_settings": peft}, {"load_best_model_at_end": False, "save_total_limit": 2})
    fit(convert(tmp_path, values))
    kept = sorted(path.name.partition("step=")[2] or path.name for path in (tmp_path / "run").rglob("*.ckpt"))
    assert kept == ["4.ckpt", "6.ckpt", "last.ckpt"]  # the newest two, and the end
    adapter = next((tmp_path / "run").rglob("export"))
    model = {"model_path": str(base), "adapter_path": str(adapter)}
    assert len(predict(convert(tmp_path, inference(tmp_path, model), "infer.yaml"))) == 12
    merge = {"model_settings": {"model_path": str(base), "model_type": "causal", "transformers_settings": {}}}
    merge |= {"tokenizer_settings": {}, "adapter_path": str(adapter), "save_path": str(tmp_path / "merged")}
    line = convert(tmp_path, merge, "merge.sh").read_text().splitlines()[-1]
    assert lit_alignment(shlex.split(line)[1:]) == 0
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft_prefix", "sft_prompt", "sft_p_tuning"])
def test_vectors_before_the_tokens_train(name, tmp_path, base):
    peft = json.loads((CONFIGS / f"{name}.json").read_text())["model_settings"]["peft_settings"]
    trainer = fit(convert(tmp_path, sft(tmp_path, base, {"peft_settings": peft}, {"max_steps": 2})))
    assert trainer.global_step == 2 and "val/loss" in trainer.callback_metrics


@pytest.mark.slow
def test_a_run_that_ends_before_its_first_validation_keeps_its_weights(tmp_path, base):
    peft = {"name": "LORA", "r": 4, "target_modules": ["q_proj"]}
    values = sft(tmp_path, base, {"peft_settings": peft}, {"max_steps": 3, "eval_steps": 150, "save_steps": 150})
    fit(convert(tmp_path, values))
    last = next((tmp_path / "run").rglob("last.ckpt"))
    assert torch.load(last, weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_an_adapter_trains_on(tmp_path, base):
    peft = {"name": "LORA", "r": 4, "target_modules": ["q_proj"]}
    fit(convert(tmp_path, sft(tmp_path, base, {"peft_settings": peft}, {"max_steps": 2})))
    adapter = next((tmp_path / "run").rglob("export"))
    values = sft(tmp_path, base, {"adapter_path": str(adapter)}, {"max_steps": 2}, log_path=str(tmp_path / "second"))
    assert fit(convert(tmp_path, values, "second.yaml")).global_step == 2


def preferring(tmp_path, base, kind, records, model, trainer):
    """An old configuration of preference optimisation, with picks of chats."""
    values = scored(tmp_path, base, kind, records, {"model_type": "causal", **model}, trainer)
    picks = {"generation_config": {"max_new_tokens": 4, "stop_strings": "</RS>"}, "metric_settings": []}
    return values | {"cherry_pick_settings": {**picks, "dataset_settings": dataset(tmp_path)}}


PROMPT, GOOD, BAD = CHATS[0]["messages"][:1], *({"role": "bot", "content": text} for text in ("please reply", "repair"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid_with_margin", "slic_hf"])
def test_pairs_train_beside_a_reference_or_without(loss, tmp_path, base):
    records = [
        {"id": i, "context": PROMPT, "answer_w": GOOD, "answer_l": BAD, "precomputed_margin": 0.5} for i in range(4)
    ]
    settings = {"loss_settings": {"loss_type": loss}, "max_steps": 2}
    trainer = fit(convert(tmp_path, preferring(tmp_path, base, "pair_preferences", records, {}, settings)))
    assert trainer.global_step == 2 and "val/accuracy" in trainer.callback_metrics
    assert trainer.lightning_module.reference == ("none" if loss == "slic_hf" else "cached")
    assert len((tmp_path / "run/cherry_picks.jsonl").read_text().splitlines()) == len(CHATS)


@pytest.mark.slow
def test_judged_responses_train_an_adapter(tmp_path, base):
    prompts = [[{"role": "user", "content": text}] for text in ("order", "does not work")]
    judged = [{"context": prompts[i % 2], "answer": (GOOD, BAD)[i % 2], "is_desirable": i % 2 == 0} for i in range(8)]
    records = [{"id": i, **record} for i, record in enumerate(judged)]
    peft = {"peft_settings": {"name": "LORA", "r": 4, "target_modules": ["q_proj"]}}
    trainer = fit(convert(tmp_path, preferring(tmp_path, base, "kto", records, peft, {"max_steps": 2})))
    assert trainer.global_step == 2 and trainer.lightning_module.reference == "adapter_off"


def scored(tmp_path, base, kind, records, model, trainer):
    """An old configuration of training a model that scores."""
    values = sft(tmp_path, base, {"model_type": "seq_cls", **model}, trainer)
    chat = {key: value for key, value in dataset(tmp_path).items() if key not in ("sources", "dataset_type")}
    source = {"name": "records", "records_path": write_jsonl(tmp_path / "records.jsonl", records), "sample_rate": 1}
    each = {"sources": [source], "dataset_type": kind, "chat_settings": chat}
    return values | {"train_dataset_settings": each, "val_dataset_settings": each}


@pytest.mark.slow
def test_classifier_trains_and_classifies(tmp_path, base):
    records = [{"id": i, "messages": CHATS[0]["messages"][:1], "label": i % 2} for i in range(8)]
    loss = {"loss_settings": {"alpha": "auto", "gamma": 2.0}, "max_steps": 2}
    values = scored(tmp_path, base, "classification", records, {"model_kwargs": {"num_labels": 2}}, loss)
    trainer = fit(convert(tmp_path, values))
    assert trainer.global_step == 2 and "val/accuracy" in trainer.callback_metrics
    export = next((tmp_path / "run").rglob("export"))
    model = {"model_path": str(export), "model_type": "seq_cls", "transformers_settings": {"torch_dtype": "float32"}}
    old = {"inference_settings": [{"model_settings": model, "tokenizer_settings": {}, "batch": 3}]}
    old |= {"dataset_settings": values["val_dataset_settings"], "save_path": str(tmp_path / "classes")}
    build(["predict", "--config", str(convert(tmp_path, old, "infer.yaml")), "--trainer.accelerator=cpu"], run=True)
    lines = [json.loads(line) for line in (tmp_path / "classes/classes.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 1] * 4 and lines[0]["prediction"] in "01"


@pytest.mark.slow
def test_reward_model_trains_and_the_choice_follows_its_scores(tmp_path, base):
    prompt = CHATS[0]["messages"][:1]
    answers = [{"role": "bot", "content": text} for text in ("please reply", "repair")]
    records = [{"id": i, "context": prompt, "answer_w": answers[0], "answer_l": answers[1]} for i in range(4)]
    trainer = fit(convert(tmp_path, scored(tmp_path, base, "pair_preferences", records, {}, {"max_steps": 2})))
    assert trainer.global_step == 2 and "val/accuracy" in trainer.callback_metrics
    export = next((tmp_path / "run").rglob("export"))
    given = [{"id": str(i), "content": text} for i, text in enumerate(("yes", "no", "urgent order"))]
    lines = [{"id": i, "dataset_name": "d", "messages": prompt, "answers": given} for i in range(3)]
    source = {"name": "answers", "records_path": write_jsonl(tmp_path / "answers.jsonl", lines), "sample_rate": 1}
    chat = {key: value for key, value in dataset(tmp_path).items() if key not in ("sources", "dataset_type")}
    reward = {"model_path": str(export), "model_type": "seq_cls", "transformers_settings": {"torch_dtype": "float32"}}
    old = {
        "dataset_settings": {"sources": [source], "dataset_type": "sampling", "chat_dataset": chat},
        "rm": reward, "tokenizer_settings": {}, "rm_batch_size": 2, "N": 2, "beta": 0.5,
        "save_path": str(tmp_path / "sampled"),
    }  # fmt: skip
    target = convert(tmp_path, old, "score.yaml")
    build(["predict", "--config", str(target), "--trainer.accelerator=cpu"], run=True)
    line = target.with_suffix(".sh").read_text().splitlines()[-1]
    assert lit_alignment(shlex.split(line)[1:]) == 0
    chosen = [json.loads(text) for text in (tmp_path / "sampled/sampled.jsonl").read_text().splitlines()]
    assert len(chosen) == 3 and all(len(set(record["rewards"])) == 2 for record in chosen)
