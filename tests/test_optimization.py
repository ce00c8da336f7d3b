import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lit_alignment.errors import ConfigError, TrainingError
from lit_alignment.optimization import OptimizerConfig, build_optimizer, learning_rate_factor
from tests.helpers import chats, sft_data, sft_module, trainer, weights


def course(total=100, **settings):
    config = OptimizerConfig(**settings)
    return [learning_rate_factor(step, total, config) for step in range(total + 1)]


def test_warmup_in_steps_and_as_a_share_rises_linearly():
    for warmup in (10, 0.1):
        found = course(warmup=warmup, schedule="constant")
        assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and set(found[10:]) == {1.0}


def test_cosine_worked_by_hand():
    """No warm-up, 100 steps: 1 at step 0, 0.5 at step 50, 0.1464 at step 75, 0 at the end."""
    found = course(warmup=0)
    assert [found[i] for i in (0, 50, 75, 100)] == pytest.approx([1, 0.5, 0.5 * (1 + math.cos(0.75 * math.pi)), 0])


def test_linear_and_floor():
    found = course(warmup=0, schedule="linear", min_ratio=0.2)
    assert [found[i] for i in (0, 50, 100)] == pytest.approx([1, 0.6, 0.2])


def test_wsd_is_flat_and_then_falls():
    found = course(warmup=10, schedule="wsd", decay_share=0.2)
    assert set(found[10:81]) == {1.0}
    assert [found[i] for i in (90, 100)] == pytest.approx([0.5, 0])


def test_wsd_does_not_jump_where_it_falls_before_it_has_risen():
    found = course(warmup=60, schedule="wsd", decay_share=0.8)
    assert max(abs(a - b) for a, b in pairwise(found)) < 0.02
    assert max(found) == found[42] == pytest.approx(43 / 60)  # (s + 1) / 60 meets (100 - s) / 80


def test_matrices_decay_and_vectors_do_not():
    layer = nn.Linear(4, 3)
    optimizer, _ = build_optimizer(layer.named_parameters(), OptimizerConfig(weight_decay=0.1), 10)
    decay = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {(3, 4): 0.1, (3,): 0.0}
    assert optimizer.defaults["fused"]


def test_schedule_steps_the_learning_rate():
    optimizer, schedule = build_optimizer(
        nn.Linear(2, 2).named_parameters(), OptimizerConfig(learning_rate=1.0, warmup=2, schedule="linear"), 4
    )
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_frozen_weights_get_no_state():
    frozen, trained = nn.Linear(2, 2), nn.Linear(2, 2)
    frozen.requires_grad_(False)
    optimizer, _ = build_optimizer([*frozen.named_parameters(), *trained.named_parameters()], OptimizerConfig(), 4)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"warmup": -1}, "warmup"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; use 0 or more"),
        ({"betas": (2.0, 2.0)}, r"betas are \[2.0, 2.0\]"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"min_ratio": 5.0}, "min_ratio is 5.0; use a share between 0 and 1"),
        ({"decay_share": 0.0}, "decay_share is 0.0"),
    ],
)
def test_useless_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**settings)


def test_nothing_to_train_and_endless_schedules_are_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(frozen.named_parameters(), OptimizerConfig(), 4)
    with pytest.raises(ConfigError, match="set trainer.max_steps or trainer.max_epochs"):
        build_optimizer(nn.Linear(2, 2).named_parameters(), OptimizerConfig(), math.inf)
    endless = OptimizerConfig(schedule="constant", warmup=2)
    optimizer, _ = build_optimizer(nn.Linear(2, 2).named_parameters(), endless, math.inf)
    assert isinstance(optimizer, torch.optim.AdamW)


def run_with_nan(tmp_path, monkeypatch, at, non_finite, **options):
    """A run in which the loss of one record's micro-batch is non-finite."""
    module = sft_module(optimizer=OptimizerConfig(1e-2, schedule="constant", warmup=0, non_finite=non_finite))
    data = sft_data(module, chats(8), packing=False, batch_size=1)
    original = module._summed_loss

    def poisoned(batch, smoothing):
        loss, hits, weight = original(batch, smoothing)
        return (loss * float("nan") if batch.ids == [at] else loss), hits, weight

    monkeypatch.setattr(module, "_summed_loss", poisoned)
    before = []

    class Weights(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before.append(weights(pl_module))

    runner = trainer(tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=[Weights()], **options)
    runner.fit(module, data)
    return module, before, runner


def test_non_finite_loss_stops_the_run_with_the_offending_records(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match=r"optimizer step \d is non-finite. Offending micro-batches: train/r3\. "):
        run_with_nan(tmp_path, monkeypatch, "train/r3", "stop")


def test_or_skips_the_step_and_leaves_the_weights_as_they_are(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match=r"optimizer step \d is skipped, its loss is non-finite: train/r3"):
        module, before, runner = run_with_nan(tmp_path, monkeypatch, "train/r3", "skip")
    assert runner.global_step == len(before) == 4
    moved = [
        any(not torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
        for first, second in zip(before, [*before[1:], weights(module)], strict=True)
    ]
    assert sorted(moved) == [False, True, True, True]
    assert all(bool(torch.isfinite(value).all()) for value in weights(module).values())


def test_betas_and_eps_are_those_of_the_update():
    """Three steps of AdamW, worked by the paper, with factors and a floor that differ from torch's own."""
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    settings = {"learning_rate": 0.1, "betas": (0.5, 0.75), "eps": 0.25, "schedule": "constant", "warmup": 0}
    optimizer, _ = build_optimizer([("weight", weight)], OptimizerConfig(**settings), 10)
    expected, mean, square = weight.detach().clone(), torch.zeros(2), torch.zeros(2)
    for step, gradient in enumerate(torch.tensor([[1.0, -2.0], [0.5, 4.0], [-3.0, 0.0]]), start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.5 * mean + 0.5 * gradient
        square = 0.75 * square + 0.25 * gradient**2
        expected -= 0.1 * (mean / (1 - 0.5**step)) / ((square / (1 - 0.75**step)).sqrt() + 0.25)
        torch.testing.assert_close(weight.detach(), expected)
