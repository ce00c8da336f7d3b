"""Policy optimisation: whose rollouts a step trains on, what its loss is divided by, and how a run goes on."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lit_alignment import CherryPicks, DecodingConfig, FSDP2Strategy, PolicyLossConfig, RolloutConfig
from lit_alignment.checkpoints.sharded import full
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.rollout import Answer, Group
from lit_alignment.errors import ConfigError, RewardError
from lit_alignment.losses.policy_config import PRESETS
from lit_alignment.rollout.builtin_rewards import LengthReward
from lit_alignment.rollout.rewards import RewardFunction
from lit_alignment.rollout.samplers import TransformersSampler
from lit_alignment.training.policy_values import best_and_worst
from tests.helpers import (
    Killed,
    assert_same_gradients,
    base_model_folder,
    chats,
    policy_data,
    policy_module,
    step_gradients,
    trainer,
    weights,
)
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rewards import VowelReward

KILLS = [(1, 2), (1, 5), (1, 6), (2, 4), (2, 6)]
ROLLOUT = RolloutConfig(num_responses=4, max_new_tokens=8)


@dataclass(kw_only=True, eq=False)
class Fields(RewardFunction):
    """Keeps what it is given; scores nothing of some records."""

    inline: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.seen = []

    def __call__(self, responses, record):
        self.seen.append(record)
        return [None if record["kind"] == "odd" else float(len(text)) for text in responses]


class Recorded(TransformersSampler):
    """Remembers the weights and the step of each rollout, and its responses."""

    def __init__(self):
        super().__init__()
        self.rollouts = []

    def sync(self, step):
        super().sync(step)
        parameters = [p.detach().double().sum() for p in self._policy.network.parameters()]
        self.rollouts.append({"step": step, "weights": float(torch.stack(parameters).sum()), "responses": []})

    def sample(self, requests, wanted_logps=True):
        found = super().sample(requests, wanted_logps)
        self.rollouts[-1]["responses"] += [completion.token_ids for group in found for completion in group]
        return found


class Steps(Callback):
    """Weights at the first micro-batch of each step; what each micro-batch is trained on; dies before one of them."""

    def __init__(self, die_at=None):
        self.weights, self.batches, self.die_at = [], [], die_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.batches) == self.die_at:
            raise Killed
        if batch_idx % trainer.accumulate_grad_batches == 0:
            parameters = [p.detach().double().sum() for p in pl_module.network.parameters()]
            self.weights.append(float(torch.stack(parameters).sum()))
        self.batches.append((batch.ids, batch.targets.tolist(), batch.advantages.tolist()))


def fields(number):
    return [
        {**record, "kind": "odd" if i % 2 else "even", "goal": {"value": i}} for i, record in enumerate(chats(number))
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_rollout_is_from_the_weights_of_its_own_first_step(tmp_path, accumulate, steps):
    sampler, seen = Recorded(), Steps()
    rollout = RolloutConfig(num_responses=3, max_new_tokens=4, steps_per_rollout=steps)
    module = policy_module(rollout=rollout, engine=sampler)
    data = policy_data(module, chats(12), batch_size=2)
    trainer(tmp_path, callbacks=[seen], accumulate_grad_batches=accumulate).fit(module, data)
    assert len(seen.weights) == 6 // accumulate and len(set(seen.weights)) == len(seen.weights)  # each step moves them
    assert [each["step"] for each in sampler.rollouts] == list(range(0, len(seen.weights), steps))
    assert [each["weights"] for each in sampler.rollouts] == seen.weights[::steps]


def test_a_step_is_one_mean_however_its_prompts_are_packed_and_split(tmp_path):
    def gradients(name, **settings):
        accumulate = settings.pop("accumulate", 1)
        module = policy_module(rollout=ROLLOUT)
        data = policy_data(module, chats(8), **settings)
        return step_gradients(tmp_path / name, module, data, accumulate_grad_batches=accumulate)

    whole = gradients("whole", batch_size=8)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    assert_same_gradients(gradients("split", batch_size=2, accumulate=4), whole)
    assert_same_gradients(gradients("unshared", batch_size=4, accumulate=2, share_prompts=False), whole)
    assert_same_gradients(gradients("padded", batch_size=3, accumulate=3, packing=False), whole)


@pytest.mark.parametrize("name", PRESETS)
def test_first_loss_of_every_preset_is_that_of_its_advantages(tmp_path, name):
    """The policy is still the one that has sampled: ratios are 1, and the loss is minus a mean of advantages."""
    module = policy_module(rollout=ROLLOUT, loss=PolicyLossConfig(name))
    data = policy_data(module, chats(4), batch_size=4)
    found = []
    module.on_train_batch_end = lambda outputs, batch, index: found.append((float(outputs["loss"]), batch))
    trainer(tmp_path, max_steps=1).fit(module, data)
    loss, batch = found[0]
    lengths = torch.tensor(batch.lengths)
    of_answers = {
        "grpo": batch.advantages.mean(),
        "gspo": batch.advantages.mean(),
        "dr_grpo": (batch.advantages * lengths).sum() / (16 * ROLLOUT.max_new_tokens),
        "luspo": (batch.advantages * lengths).sum() / 16,
        "sapo": (2 * batch.advantages / torch.where(batch.advantages > 0, 1.0, 1.05)).mean(),
    }
    if name != "cispo":  # whose value holds log-probabilities
        expected = of_answers.get(name, (batch.advantages * lengths).sum() / lengths.sum())
        assert loss == pytest.approx(-float(expected), abs=1e-6)
    assert float(batch.advantages.abs().max()) > 0.1


def test_rewards_see_all_fields_and_the_prompt_as_the_model_does(tmp_path):
    reward = Fields()
    module = policy_module(rewards=[reward], rollout=ROLLOUT)
    records = fields(4)
    data = policy_data(module, records, batch_size=4)
    trainer(tmp_path, max_steps=1).fit(module, data)
    seen = {record["goal"]["value"]: record for record in reward.seen}
    assert sorted(seen) == [0, 1, 2, 3]
    for index, record in enumerate(records):
        assert [m["content"] for m in seen[index]["messages"]] == [m["content"] for m in record["messages"]]


def test_responses_without_a_score_are_as_if_they_were_not_drawn(tmp_path):
    """Records of one kind are not scored: the step is the one of the others alone."""

    def gradients(name, records):
        # One prompt is sampled at a time, so that its responses are the same in both runs.
        module = policy_module(rewards=[Fields()], rollout=ROLLOUT, engine=TransformersSampler(4))
        data = policy_data(module, records, batch_size=1)
        return step_gradients(tmp_path / name, module, data, accumulate_grad_batches=len(records))

    records = fields(6)
    assert_same_gradients(gradients("all", records), gradients("even", records[::2]))


def test_a_group_without_variance_is_drawn_again_and_its_share_is_logged(tmp_path):
    @dataclass(kw_only=True, eq=False)
    class Same(RewardFunction):
        inline: ClassVar[bool] = True

        def __post_init__(self):
            super().__post_init__()
            self.calls = Counter()

        def __call__(self, responses, record):
            self.calls[record["id"]] += 1
            return [1.0] * 4 if int(record["id"][1:]) % 2 else [float(i) for i in range(4)]

    reward, sampler = Same(), Recorded()
    module = policy_module(rewards=[reward], rollout=RolloutConfig(4, 6, max_redraws=2), engine=sampler)
    run = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
    run.fit(module, policy_data(module, chats(4), batch_size=4))
    assert reward.calls == {"r0": 1, "r1": 3, "r2": 1, "r3": 3}
    assert float(run.callback_metrics["train/no_variance"]) == 0.5
    drawn = sampler.rollouts[0]["responses"]
    assert len(drawn) == 16 + 8 + 8 and drawn[16:24] != drawn[24:32]


def test_truncated_responses_can_be_left_out(tmp_path):
    def gradients(name, mask):
        module = policy_module(rollout=ROLLOUT, loss=PolicyLossConfig(mask_truncated=mask))
        return step_gradients(tmp_path / name, module, policy_data(module, chats(4), batch_size=4))

    # Nothing a random model writes ends within eight tokens.
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients("masked", True).values())
    assert max(float(gradient.abs().max()) for gradient in gradients("kept", False).values()) > 1e-3


@pytest.mark.parametrize(
    ("steps", "die_at"),  # a rollout's steps, and the micro-batch: between rollouts, their steps, inside of a window
    [(1, 4), (2, 2), (2, 5), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in KILLS)],
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path, die_at, steps):
    def run(name, resume=None, die_at=None):
        sampler, seen = Recorded(), Steps(die_at)
        rollout = RolloutConfig(num_responses=3, max_new_tokens=5, steps_per_rollout=steps)
        module = policy_module(base, lora=True, rollout=rollout, engine=sampler)
        data = policy_data(module, chats(16), batch_size=2)
        save = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1, save_top_k=0)
        options = {"callbacks": [seen, save], "accumulate_grad_batches": 2, "enable_checkpointing": True}
        try:
            trainer(tmp_path / name, **options).fit(module, data, ckpt_path=resume)
        except Killed:
            return None, seen
        return weights(module), seen

    base = base_model_folder(tmp_path / "base")
    expected, whole = run("whole")
    _, before = run("killed", die_at=die_at)
    found, after = run("resumed", resume=str(tmp_path / "killed/last.ckpt"))
    kept = die_at // 2 * 2  # of the micro-batches those of whole steps
    stored = torch.load(tmp_path / "killed/last.ckpt", weights_only=True)["PolicyDataModule"]["rollout"]["groups"]
    assert len(stored) == (4 if steps == 2 and kept // 2 % 2 else 0)  # those of steps that are still to come
    assert before.batches[:kept] + after.batches == whole.batches
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_checkpoint_from_inside_of_a_step_samples_the_same_responses_again(tmp_path):
    class Inside(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:  # the first half of the second step
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    def run(callbacks, resume=None):
        seen = Steps()
        module = policy_module(rollout=RolloutConfig(3, 5))
        options = {"callbacks": [seen, *callbacks], "accumulate_grad_batches": 2}
        trainer(tmp_path, **options).fit(module, policy_data(module, chats(8), batch_size=2), ckpt_path=resume)
        return weights(module), seen.batches

    expected, whole = run([Inside()])
    found, after = run([], str(tmp_path / "inside.ckpt"))
    assert after == whole[2:]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_share_a_step_and_its_denominators(tmp_path, strategy):
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
    loss = PolicyLossConfig("dapo", advantage="batch")
    module = policy_module(rollout=ROLLOUT, loss=loss, engine=TransformersSampler(4))
    return step_gradients(folder, module, policy_data(module, chats(3), batch_size=1), **options)


def test_validation_rewards_greedy_answers_and_ranks_checkpoints(tmp_path):
    module = policy_module(rollout=ROLLOUT)
    data = policy_data(module, chats(8), chats(3, seed=5), batch_size=2)
    best = ModelCheckpoint(tmp_path, monitor="val/reward", mode="max")
    picks = CherryPicks(num_samples=2, generation=DecodingConfig(max_new_tokens=8))
    run = trainer(tmp_path, callbacks=[best, picks], enable_checkpointing=True, log_every_n_steps=1)
    run.fit(module, data)
    (again,) = run.validate(module, data, verbose=False)
    assert again["val/reward"] == pytest.approx(float(best.best_model_score), abs=1e-7)
    answers = [
        module.respond([item], ROLLOUT.greedy)[0].completions[0] for item in data.predict_items(data.sources["val"])
    ]
    expected = VowelReward()([answer.text for answer in answers], {})
    assert again["val/reward"] == pytest.approx(sum(expected) / 3, abs=1e-6)
    page = (tmp_path / "report.html").read_text()
    assert "train/reward" in page and "val/reward" in page


def test_report_has_the_best_and_the_worst_response_of_the_last_rollout(tmp_path):
    module = policy_module(rewards=[VowelReward(), VowelReward(name="again", weight=0.5)], rollout=ROLLOUT)
    data = policy_data(module, chats(8), chats(2, seed=5), batch_size=2)
    picks = CherryPicks(num_samples=1, generation=DecodingConfig(max_new_tokens=8))
    trainer(tmp_path, callbacks=[picks]).fit(module, data)
    answers = [(group.index, answer) for group in data.rollout for answer in group.answers]
    assert len(answers) == 2 * 4  # of the last step's prompts
    best, worst = module.notable()
    rewards = [answer.reward for _, answer in answers]
    for shown, index in ((best, rewards.index(max(rewards))), (worst, rewards.index(min(rewards)))):
        record, answer = answers[index]
        vowels = answer.rewards["vowel"]
        assert shown.text == answer.text and shown.truncated == answer.truncated
        assert shown.scores == {"reward": 1.5 * vowels, "reward_vowel": vowels, "reward_again": vowels}
        prompt = data.examples["train"][record]["input_ids"]
        assert shown.messages[-1]["content"] in data.tokenizer.decode(prompt)
    page = (tmp_path / "report.html").read_text().partition("Of the last rollout")[2].partition("<h2")[0]
    assert f"reward {best.scores['reward']:.4g}" in page and f"reward {worst.scores['reward']:.4g}" in page


def test_equal_rewards_make_one_notable_response_and_missing_ones_none():
    same = [Answer(token_ids=[1], text=text, truncated=False, reward=1.0) for text in "ab"]
    unscored = Answer(token_ids=[1], text="c", truncated=False)
    group = Group(index=7, prompt=[1], answers=[unscored, *same])
    assert best_and_worst([group]) == [("best and worst", 7, same[0])]
    assert best_and_worst([Group(index=7, prompt=[1], answers=[unscored])]) == []


def test_training_raises_the_reward_and_shows_it(tmp_path):
    module = policy_module(rollout=RolloutConfig(8, 8))
    data = policy_data(module, chats(32), chats(4, seed=5), batch_size=4)
    run = trainer(tmp_path, log_every_n_steps=1, max_epochs=2)
    found, shown = [], []

    def note(*_):
        found.append(float(run.callback_metrics["train/reward"]))
        shown.append(run.progress_bar_metrics["train/reward"])  # the loss alone says nothing: it is near 0

    module.on_train_batch_end = note
    run.fit(module, data)
    assert sum(found[-4:]) / 4 > sum(found[:4]) / 4 + 0.1
    assert shown == pytest.approx(found)


def test_kl_to_the_reference_is_zero_at_first_and_holds_the_policy_back(tmp_path):
    def fitted(name, weight):
        module = policy_module(
            base, lora=True, rollout=RolloutConfig(4, 6, temperature=0.7), loss=PolicyLossConfig(kl_weight=weight)
        )
        run = trainer(tmp_path / name, log_every_n_steps=1)
        found = []
        module.on_train_batch_end = lambda *_: found.append(float(run.callback_metrics["train/kl"]))
        run.fit(module, policy_data(module, chats(16), batch_size=2))
        return found

    base = base_model_folder(tmp_path / "base")
    loose, tight = fitted("loose", 1e-6), fitted("tight", 10.0)
    assert loose[0] == tight[0] == 0.0
    assert loose[-1] > 3 * tight[-1] > 0


def test_a_reward_that_raises_names_the_record(tmp_path):
    @dataclass(kw_only=True, eq=False)
    class Broken(RewardFunction):
        def __call__(self, responses, record):
            raise KeyError("answer")

    module = policy_module(rewards=[Broken()], rollout=ROLLOUT)
    with pytest.raises(RewardError, match=r"broken: record 'train/r\d'.*KeyError: 'answer'.*test_policy.py"):
        trainer(tmp_path, max_steps=1).fit(module, policy_data(module, chats(4), batch_size=4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards": []}, "model.rewards"),
        ({"rollout": RolloutConfig(1)}, "num_responses is 1"),
        ({"rollout": RolloutConfig(top_p=0.9, steps_per_rollout=2)}, "top_p"),
        ({"loss": PolicyLossConfig(correction="token_truncate")}, "samples from the policy itself"),
        ({"reference": "frozen_copy"}, "kl_weight is 0"),
        ({"loss": PolicyLossConfig(kl_weight=0.1), "reference": "none"}, "needs one"),
        ({"loss": PolicyLossConfig(kl_weight=0.1), "reference": "cached"}, "not known before"),
        ({"loss": PolicyLossConfig(kl_weight=0.1), "reference": "adapter_off"}, "no new adapters"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        policy_module(**settings)


def test_temperature_of_zero_is_refused():
    with pytest.raises(ConfigError, match="temperature is 0"):
        RolloutConfig(temperature=0)


def test_workers_are_refused():
    with pytest.raises(ConfigError, match="num_workers is 2"):
        policy_data(policy_module(), chats(2), num_workers=2)


def test_logged_values_are_over_all_responses_of_the_interval(tmp_path):
    module = policy_module(rollout=ROLLOUT)
    data = policy_data(module, chats(8), batch_size=2)
    run = trainer(tmp_path, log_every_n_steps=4)
    rewards = []
    weigh = module.weigh
    module.weigh = lambda groups: rewards.extend(a.reward for g in groups for a in g.answers) or weigh(groups)
    run.fit(module, data)
    assert float(run.callback_metrics["train/reward"]) == pytest.approx(sum(rewards) / len(rewards))
    assert len(rewards) == 32 and math.isfinite(float(run.callback_metrics["train/entropy"]))
    assert float(run.callback_metrics["train/ratio"]) == pytest.approx(1.0)
    steps = torch.tensor(rewards, dtype=torch.float64).reshape(4, 8)
    assert float(run.callback_metrics["train/reward_deviation"]) == pytest.approx(float(steps.std(1).mean()))


def test_several_rewards_are_logged_each_and_summed_by_weight(tmp_path):
    rewards = [VowelReward(weight=2.0), LengthReward(minimum=4, tolerance=4, weight=-0.5)]
    module = policy_module(rewards=rewards, rollout=ROLLOUT)
    run = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
    run.fit(module, policy_data(module, chats(4), batch_size=4))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    expected = 2 * logged["train/reward_vowel"] - 0.5 * logged["train/reward_length"]
    assert logged["train/reward"] == pytest.approx(expected) and logged["train/reward_vowel_deviation"] > 0


def test_responses_that_learned_positions_have_no_room_for_are_refused(tmp_path):
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained("configs/tiny").save_pretrained(tmp_path)
    module = policy_module(str(tmp_path), rollout=ROLLOUT)
    data = policy_data(module, chats(2, longest=2), encoding=EncodingConfig(max_length=60))
    with pytest.raises(ConfigError, match="64 learned positions.*behind which 8 tokens are sampled. Set that to 56"):
        trainer(tmp_path).fit(module, data)
