"""Distillation: whose responses a step trains on, its loss against full logits, and how a run goes on."""

import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_alignment import AdapterConfig, DistillationConfig, FSDP2Strategy, OptimizerConfig, RolloutConfig
from lit_alignment.checkpoints.sharded import full
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.errors import ConfigError
from lit_alignment.losses import token_divergence
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.rollout.samplers import TransformersSampler
from tests.helpers import (
    ROOT,
    Killed,
    Seen,
    assert_same_gradients,
    base_model_folder,
    chats,
    distillation_data,
    distillation_module,
    sft_data,
    sft_module,
    step_gradients,
    trainer,
    weights,
)
from tests.helpers.deepspeed_on_cpu import DeepSpeedOnCPU
from tests.helpers.ranks import run_on_ranks

ROLLOUT = RolloutConfig(num_responses=2, max_new_tokens=8)


def prompts(number: int) -> list[dict]:
    """Records without a response."""
    return [{"id": f"p{i}", "prompt": f"please order {i}"} for i in range(number)]


def gpt2(folder: Path, width: int, vocabulary: int = 768) -> BackboneConfig:
    """A random model that computes all in the precision of its weights, as Llama's norms do not."""
    size = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 512, "vocab_size": vocabulary}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    AutoConfig.for_model("gpt2", initializer_range=0.3, **size, **dropout).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(folder)
    return BackboneConfig(str(folder), weights="random")


def slow_loss(module, groups) -> torch.Tensor:
    """Mean divergence over the tokens of groups, each response alone, with all logits."""
    divergences, number = torch.zeros((), dtype=torch.float64), 0.0
    for group in groups:
        for answer in group.answers:
            ids = torch.tensor([group.prompt + answer.token_ids])
            student, teacher = (
                network(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1, :768]
                for network in (module.network, module.teacher_model)
            )
            of_tokens = torch.tensor(answer.weights or [1.0] * len(answer.token_ids), dtype=torch.float64)
            each = token_divergence(student, teacher, module.divergence.beta, module.divergence.temperature)
            divergences, number = divergences + (each * of_tokens).sum(), number + float(of_tokens.sum())
    return divergences / number


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "settings", [{"batch_size": 6}, {"batch_size": 2}, {"batch_size": 4, "packing": False}], ids=lambda s: str(s)
)
def test_step_is_that_of_a_slow_loop_over_full_logits(tmp_path, settings, beta):
    student, teacher = gpt2(tmp_path / "student", 16), gpt2(tmp_path / "teacher", 24, vocabulary=800)
    module = distillation_module(
        backbone=student,
        teacher=teacher,
        divergence=DistillationConfig(beta, temperature=1.5),
        on_policy_share=0.5,
        rollout=ROLLOUT,
        optimizer=OptimizerConfig(learning_rate=1e-30),  # the weights stay for the slow loop
    )
    groups, losses = [], []
    weigh = module.weigh
    module.weigh = lambda own: groups.extend(own) or weigh(own)
    step = module.step
    module.step = lambda *given: losses.append(step(*given)) or losses[-1]
    accumulate = -(-6 // settings["batch_size"])
    records = chats(6)
    for record in records[:3]:
        record["messages"][-1]["weight"] = 0.5
    data = distillation_data(module, records, **settings)
    options = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    found = step_gradients(tmp_path, module, data, **options)
    assert sorted(len(group.answers) for group in groups) == [1, 1, 1, 2, 2, 2]
    module.zero_grad()
    expected = slow_loss(module.double(), groups)
    assert float(sum(losses).detach()) / accumulate == pytest.approx(expected.item(), abs=1e-9)
    assert expected.item() > 0.01
    expected.backward()
    for name, parameter in module.network.named_parameters():
        torch.testing.assert_close(found[f"model.{name}"], parameter.grad, rtol=1e-9, atol=1e-9)


def test_given_responses_train_what_sft_trains(tmp_path):
    module = distillation_module(on_policy_share=0.0)
    batches = []
    module.on_train_batch_end = lambda outputs, batch, index: batches.append(batch)
    trainer(tmp_path, max_steps=1).fit(module, distillation_data(module, chats(8), batch_size=8))
    sft = sft_module()
    sft.on_train_batch_end = lambda outputs, batch, index: batches.append(batch)
    trainer(tmp_path, max_steps=1).fit(sft, sft_data(sft, chats(8), tokens_per_batch=4096))
    own, other = (sorted(t for part in torch.split(b.targets, b.lengths) for t in [part.tolist()]) for b in batches)
    assert own == other and batches[0].step == batches[1].window_weight == batches[0].num_trained


@pytest.mark.parametrize(("share", "expected"), [(0.0, [0]), (0.5, [3]), (0.3, [1, 2]), (1.0, [6])])
def test_share_is_exact_or_rounded_by_seed_and_the_same_however_a_step_is_split(share, expected):
    module = distillation_module()
    data = distillation_data(module, chats(2))
    data.on_policy_share, data._epoch = share, 0
    counts = []
    for start in range(0, 600, 6):
        whole = PlannedBatch([], 0.0, window=[list(range(start, start + 6))])
        split = PlannedBatch([], 0.0, window=[[start + 4, start + 1], [start], [start + 5, start + 2, start + 3]])
        chosen = data.on_policy(whole)
        assert sorted(chosen) == sorted(data.on_policy(split)) and set(chosen) <= set(whole.window[0])
        counts.append(len(chosen))
    assert sorted(set(counts)) == expected and sum(counts) / 600 == pytest.approx(share, abs=0.02)
    data._epoch = 5
    assert share in (0.0, 1.0) or sorted(chosen) != sorted(data.on_policy(whole))


def test_only_the_chosen_prompts_are_sampled(tmp_path):
    asked = []

    class Counting(TransformersSampler):
        def sample(self, requests, wanted_logps=True):
            asked.append(len(requests))
            return super().sample(requests, wanted_logps)

    module = distillation_module(on_policy_share=0.25, rollout=RolloutConfig(1, 4), engine=Counting())
    run = trainer(tmp_path, log_every_n_steps=1)
    run.fit(module, distillation_data(module, chats(16), batch_size=8))
    assert asked == [2, 2]
    assert float(run.callback_metrics["train/length"]) <= 4
    assert float(run.callback_metrics["train/rollout_seconds"]) > 0


def test_records_without_a_response_are_answered_by_the_student_alone(tmp_path):
    module = distillation_module(on_policy_share=1.0, rollout=RolloutConfig(1, 4))
    trainer(tmp_path, max_steps=1).fit(module, distillation_data(module, prompts(3) + chats(2), batch_size=5))
    module = distillation_module(on_policy_share=0.5)
    with pytest.raises(ConfigError, match=r"data.train: 3 of 5 records have no response of their own to train on"):
        trainer(tmp_path, max_steps=1).fit(module, distillation_data(module, prompts(3) + chats(2), batch_size=5))
    module = distillation_module()
    with pytest.raises(ConfigError, match=r"data.val: 2 of 3 records have no response of their own to validate on"):
        data = distillation_data(module, chats(2), prompts(2) + chats(1))
        trainer(tmp_path, max_steps=1).fit(module, data)


def test_training_brings_the_student_near_the_teacher_which_stays(tmp_path):
    module = distillation_module(on_policy_share=0.5, rollout=RolloutConfig(1, 8))
    data = distillation_data(module, chats(32), chats(4, seed=5), batch_size=4)
    save = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, max_epochs=3, callbacks=[save], enable_checkpointing=True)
    found, teachers = [], []

    def after_validation():
        teachers.append({name: p.clone() for name, p in module.teacher_model.named_parameters()})
        found.append(float(run.callback_metrics["val/kl"]))

    module.on_validation_end = after_validation
    run.fit(module, data)
    assert found[-1] < 0.5 * found[0]  # the first one is before training
    assert all(torch.equal(teachers[-1][name], value) for name, value in teachers[0].items())
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert stored and not [name for name in stored if "teacher" in name]
    (again,) = run.validate(module, data, verbose=False)
    groups = [data.collate(data.examples["val"].rows([i]), PlannedBatch([i], 0.0)) for i in range(4)]
    kl = torch.zeros((), dtype=torch.float64)
    for batch in groups:
        student, teacher = (
            network(input_ids=batch.input_ids, use_cache=False).logits[0, batch.read_at]
            for network in (module.network, module.teacher_model)
        )
        kl += token_divergence(student, teacher, 0.0).sum().detach()
    assert again["val/kl"] == pytest.approx(kl.item() / sum(b.num_trained for b in groups), rel=1e-5)
    assert 0 < again["val/loss"] < again["val/kl"]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("die_at", [2, 5, 6])  # micro-batches: between steps, inside of a window, between rollouts
def test_a_killed_run_goes_on_to_the_bit(tmp_path, die_at, steps):
    def run(name, resume=None, die_at=None):
        seen = Seen(die_at)
        rollout = RolloutConfig(2, 5, steps_per_rollout=steps)
        teacher = BackboneConfig(str(tmp_path / "teacher"))
        module = distillation_module(base, lora=True, teacher=teacher, rollout=rollout, on_policy_share=0.5)
        data = distillation_data(module, chats(16), batch_size=2)
        save = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1, save_top_k=0)
        options = {"callbacks": [seen, save], "accumulate_grad_batches": 2, "enable_checkpointing": True}
        try:
            trainer(tmp_path / name, **options).fit(module, data, ckpt_path=resume)
        except Killed:
            return None, seen
        return weights(module), seen

    base = base_model_folder(tmp_path / "base")
    base_model_folder(tmp_path / "teacher", num_hidden_layers=3)
    expected, whole = run("whole")
    _, before = run("killed", die_at=die_at)
    found, after = run("resumed", resume=str(tmp_path / "killed/last.ckpt"))
    kept = die_at // 2 * 2  # of the micro-batches those of whole steps
    assert before.losses[:kept] + after.losses == whole.losses
    assert before.ids[:kept] + after.ids == whole.ids
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_share_a_step_and_its_denominator(tmp_path, strategy):
    run_on_ranks(gradients_on_rank, str(tmp_path), strategy)
    alone = gradients_of_a_step(tmp_path / "alone", accumulate_grad_batches=4)
    for rank in range(2):
        assert_same_gradients(torch.load(tmp_path / f"{rank}.pt"), alone)


def gradients_on_rank(folder: str, strategy: str) -> None:
    kind = "ddp" if strategy == "ddp" else FSDP2Strategy()
    found = gradients_of_a_step(folder, accumulate_grad_batches=2, devices=2, strategy=kind)
    whole = {name: full(gradient) for name, gradient in found.items()}
    torch.save(whole, Path(folder) / f"{os.environ['RANK']}.pt")


def gradients_of_a_step(folder, **options):
    """Over three prompts, so that one rank has a dummy; in batches of one, so that each samples as one process does."""
    module = distillation_module(on_policy_share=0.4, rollout=ROLLOUT, engine=TransformersSampler(2))
    return step_gradients(folder, module, distillation_data(module, chats(3), batch_size=1), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "share"), [(2, 0.5), (3, 0.0)])
def test_stages_of_zero_train_as_one_process(tmp_path, stage, share):
    run_on_ranks(losses_under_zero, tmp_path, stage, share)
    expected = losses_of_run(tmp_path, share, accumulate_grad_batches=2)
    assert len(expected) == 5
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-5)


def losses_under_zero(folder: Path, stage: int, share: float) -> None:
    found = losses_of_run(folder, share, strategy=DeepSpeedOnCPU(stage), devices=2)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def losses_of_run(folder: Path, share: float, **options) -> list[float]:
    """Of each step, and of the validation at the end; there is a dummy among the last batches of both."""
    module = distillation_module(on_policy_share=share)
    run, found = trainer(folder, log_every_n_steps=1, **options), []

    def after_batch(outputs, batch, index):
        if module.trainer.global_step > len(found):
            found.append(float(run.logged_metrics["train/loss"]))

    module.on_train_batch_end = after_batch
    run.fit(module, distillation_data(module, chats(7, longest=5), chats(3, seed=4), batch_size=1))
    return [*found, float(run.callback_metrics["val/kl"])]


@pytest.mark.slow
def test_stage_3_is_refused_where_the_student_answers(tmp_path):
    run_on_ranks(refused_under_zero, tmp_path)


def refused_under_zero(folder: Path) -> None:
    with pytest.raises(ConfigError, match="stage 3 cannot gather"):
        losses_of_run(folder, 0.5, strategy=DeepSpeedOnCPU(3), devices=2)


def test_teacher_is_with_its_adapter(tmp_path):
    base = base_model_folder(tmp_path / "base")
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft).save_pretrained(tmp_path / "adapter")
    adapter, trained = (AdapterConfig(str(tmp_path / "adapter"), trainable) for trainable in (False, True))

    def loss(name, **settings):
        module = distillation_module(base, teacher=BackboneConfig(base), on_policy_share=0.0, **settings)
        found = []
        module.on_train_batch_end = lambda outputs, batch, index: found.append(float(outputs["loss"]))
        trainer(tmp_path / name, max_steps=1).fit(module, distillation_data(module, chats(4), batch_size=4))
        return found[0]

    assert loss("same") == pytest.approx(0, abs=1e-7)
    assert loss("both", adapter=trained, teacher_adapter=adapter) == pytest.approx(0, abs=1e-7)
    assert loss("teacher", teacher_adapter=adapter) > 1e-4
    with pytest.raises(ConfigError, match="a teacher does not train"):
        distillation_module(base, teacher=BackboneConfig(base), teacher_adapter=trained)


def test_another_tokenizer_is_refused(tmp_path):
    other = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((ROOT / "configs/tiny/config.json").read_text())
    with pytest.raises(ConfigError, match=r"another tokenizer .*1 tokens differ: '<new>' is None here and \d+ there"):
        distillation_module(teacher=BackboneConfig(str(tmp_path), weights="random"))
    other = json.loads((ROOT / "configs/tiny/tokenizer_config.json").read_text())
    AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(other | {"eos_token": other["pad_token"]}))
    with pytest.raises(ConfigError, match="eos_token is '.*' here and '.*' there.*model.backbone.tokenizer"):
        distillation_module(teacher=BackboneConfig(str(tmp_path), weights="random"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"on_policy_share": 1.2}, "on_policy_share is 1.2"),
        ({"on_policy_share": 0.0, "rollout": RolloutConfig(1, 8)}, "nothing is sampled"),
        ({"on_policy_share": 0.0, "engine": TransformersSampler()}, "nothing is sampled"),
        ({"rollout": RolloutConfig(1, max_redraws=1)}, "max_redraws is 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        distillation_module(**settings)


@pytest.mark.parametrize("settings", [{"beta": 1.5}, {"beta": -0.1}, {"temperature": 0.0}])
def test_divergence_outside_its_range_is_refused(settings):
    with pytest.raises(ConfigError, match="model.divergence"):
        DistillationConfig(**settings)
