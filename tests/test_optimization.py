import math

import pytest
import torch
from torch import nn

from lit_alignment.errors import ConfigError
from lit_alignment.optimization import OptimizerConfig, build_optimizer, learning_rate_factor


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


def test_matrices_decay_and_vectors_do_not():
    layer = nn.Linear(4, 3)
    optimizer, _ = build_optimizer(layer.parameters(), OptimizerConfig(weight_decay=0.1), 10)
    decay = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {(3, 4): 0.1, (3,): 0.0}
    assert optimizer.defaults["fused"]


def test_schedule_steps_the_learning_rate():
    optimizer, schedule = build_optimizer(
        nn.Linear(2, 2).parameters(), OptimizerConfig(learning_rate=1.0, warmup=2, schedule="linear"), 4
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
    optimizer, _ = build_optimizer([*frozen.parameters(), *trained.parameters()], OptimizerConfig(), 4)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"learning_rate": 0.0}, "learning_rate is 0.0"), ({"warmup": 1.5}, "warmup is 1.5"), ({"warmup": -1}, "warmup")],
)
def test_useless_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**settings)


def test_nothing_to_train_and_endless_schedules_are_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(frozen.parameters(), OptimizerConfig(), 4)
    with pytest.raises(ConfigError, match="set trainer.max_steps or trainer.max_epochs"):
        build_optimizer(nn.Linear(2, 2).parameters(), OptimizerConfig(), math.inf)
    endless = OptimizerConfig(schedule="constant", warmup=2)
    optimizer, _ = build_optimizer(nn.Linear(2, 2).parameters(), endless, math.inf)
    assert isinstance(optimizer, torch.optim.AdamW)
