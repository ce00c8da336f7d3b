"""Rates by name and by layer, what is refused, and checkpoints of other groups."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from lit_alignment import BackboneConfig, SFTModule
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.roles import roles_of
from lit_alignment.optimization import OptimizerConfig, algorithm_class, build_optimizer
from tests.helpers import sft_module

SGD = torch.optim.SGD


def rates_of(optimizer):
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


def built(network, **settings):
    config = OptimizerConfig(**({"learning_rate": 1.0, "schedule": "constant", "warmup": 0} | settings))
    optimizer, _ = build_optimizer(network.named_parameters(), config, 10, roles=roles_of(network))
    return optimizer


def test_first_pattern_in_a_name_gives_its_rate_and_all_else_has_the_usual_one():
    network = sft_module().load_model()
    rates = rates_of(built(network, rates={r"layers\.1\.": 0.1, "_proj": 0.2, "embed_tokens": 0.3}))
    for name, rate in rates.items():
        expected = 0.1 if "layers.1." in name else 0.2 if "_proj" in name else 0.3 if "embed_tokens" in name else 1.0
        assert rate == expected, name
    assert set(rates.values()) == {0.1, 0.2, 0.3, 1.0}


@pytest.mark.parametrize("lora", [False, True])
def test_each_layer_has_a_share_of_the_rate_of_the_one_above_and_the_embeddings_the_least(lora):
    """Two layers: 1 and 1/2, embeddings 1/4, the last norm as the highest layer; a named rate stays as it is."""
    network = sft_module(lora=lora).load_model()
    rates = rates_of(built(network, layer_decay=0.5, rates={r"layers\.1\..*q_proj": 0.3}))
    for name, rate in rates.items():
        height = 2 if "embed_tokens" in name else 1 if "layers.0." in name else 0
        assert rate == (0.3 if "layers.1." in name and "q_proj" in name else 0.5**height), name
    assert len(set(rates.values())) == (3 if lora else 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rates": {"embed_token_": 1e-5}}, r"'embed_token_', which is in the name of no .* such as embed_tokens"),
        ({"rates": {"norm": 0.0}}, r"optimizer.rates.norm is 0.0; use a number above 0"),
        ({"rates": {"a(": 1.0}}, r"'a\(', which is no pattern"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; use a share above 0, at most 1"),
        ({"algorithm": SGD, "betas": (0.9, 0.9)}, r"betas is \[0.9, 0.9\], and optimizer.algorithm has settings of"),
        ({"algorithm": SGD, "eps": 1e-6}, "eps is 1e-06, and"),
        ({"algorithm": torch.optim.Rprop, "weight_decay": 0.1}, "weight_decay is 0.1; Rprop has none"),
        ({"algorithm": torch.optim.LBFGS}, "LBFGS doesn't support per-parameter options"),
        ({"algorithm": lambda groups, rate: SGD(groups, rate, weight_decay=0.1)}, "set optimizer.weight_decay"),
        ({"algorithm": lambda groups, rate: nn.Linear(2, 2)}, "makes a Linear; use a class of torch.optim.Optimizer"),
    ],
)
def test_what_would_not_do_as_it_says_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        built(sft_module().load_model(), **settings)


class Switching(SGD):
    def train(self): ...

    def eval(self): ...


def test_algorithm_that_changes_its_weights_in_place_is_refused():
    with pytest.raises(
        ConfigError, match="Switching changes its weights in place.*Use lit_alignment.ScheduleFreeAdamW"
    ):
        algorithm_class(OptimizerConfig(algorithm=Switching))


def test_layers_that_are_not_known_have_no_decay():
    with pytest.raises(ConfigError, match="layer_decay is 0.5, and the model has no layers"):
        built(nn.Linear(2, 2), layer_decay=0.5)


def trained_state(network, optimizer):
    """By name, after a step whose gradients tell parameters of one shape from each other."""
    for number, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number) if parameter.requires_grad else None
    optimizer.step()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(parameter)]: state["exp_avg"].clone() for parameter, state in optimizer.state.items()}


@pytest.mark.parametrize(("then", "now"), [({}, {"rates": {"v_proj": 0.1}}), ({"layer_decay": 0.5}, {})])
def test_states_follow_their_weights_into_other_groups(then, now):
    network = sft_module().load_model()
    first = built(network, **then)
    expected = trained_state(network, first)
    second = built(network, **now)
    assert len(first.param_groups) != len(second.param_groups)
    second.load_state_dict(first.state_dict())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(p)] for p in second.state} == set(expected)
    assert all(torch.equal(state["exp_avg"], expected[names[id(p)]]) for p, state in second.state.items())


def test_states_without_names_are_refused_where_groups_are_others():
    network = sft_module().load_model()
    first = built(network)
    trained_state(network, first)
    state = first.state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    built(network).load_state_dict(state)
    with pytest.raises(CheckpointError, match="does not name its weights. Resume it without optimizer.rates"):
        built(network, rates={"v_proj": 0.1}).load_state_dict(state)


def test_adapters_are_as_high_as_what_they_change_and_no_hidden_matrices():
    adapters = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    network = SFTModule(BackboneConfig("configs/tiny", weights="random"), adapters).load_model()
    roles = roles_of(network)
    heights = {n: roles.heights.get(id(p), 0) for n, p in network.named_parameters() if p.requires_grad}
    assert {n for n, height in heights.items() if height == 2} == {n for n in heights if "embed_tokens" in n} != set()
    assert {n for n, height in heights.items() if height == 1} == {n for n in heights if "layers.0." in n}
    assert roles.hidden == set()
