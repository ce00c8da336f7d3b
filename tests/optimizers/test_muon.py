"""Muon beside AdamW: each part is torch's own, to the bit, and only hidden matrices are Muon's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lit_alignment.errors import ConfigError
from lit_alignment.models.roles import roles_of
from lit_alignment.optimization import OptimizerConfig, build_optimizer
from lit_alignment.optimizers.muon import MuonWithAdamW, orthogonalized
from tests.helpers import ROOT

MUON = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, schedule="constant", warmup=0, algorithm=MuonWithAdamW)


def language_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "configs/tiny"))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_hidden_matrices_move_as_under_torchs_muon(shape):
    """torch's scale `match_rms_adamw` is ours; three steps, with decay."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.9, "ns_steps": 3}
    both = [
        MuonWithAdamW([{"params": [ours], "hidden": True}], **settings),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
    ]
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in both:
            optimizer.step()
        assert torch.equal(ours, theirs)


def test_all_else_moves_as_under_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))]
    theirs = [nn.Parameter(each.detach().clone()) for each in ours]
    settings = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.75), "eps": 0.25}
    both = [MuonWithAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in both:
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_update_has_singular_values_near_one_and_the_size_of_adamws():
    torch.manual_seed(0)
    matrix = torch.randn(64, 16)
    values = torch.linalg.svdvals(orthogonalized(matrix, 5).float())
    assert 0.6 < values.min() and values.max() < 1.3
    weight = nn.Parameter(torch.zeros(64, 16))
    weight.grad = matrix
    MuonWithAdamW([{"params": [weight], "hidden": True}], lr=1.0).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)


def test_embeddings_heads_norms_and_adapters_are_for_adamw():
    network = language_model()
    optimizer, _ = build_optimizer(network.named_parameters(), MUON, 10, roles=roles_of(network))
    hidden = {name for group in optimizer.param_groups if group["hidden"] for name in group["param_names"]}
    linear = {f"{name}.weight" for name, each in network.model.layers.named_modules() if isinstance(each, nn.Linear)}
    assert hidden == {f"model.layers.{name}" for name in linear} and len(hidden) > 0
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="MuonWithAdamW, and no hidden matrix is trainable"):
        build_optimizer(adapted.named_parameters(), MUON, 10, roles=roles_of(adapted))


def test_what_is_no_matrix_and_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"Muon takes matrices, and a hidden weight has shape \[2, 2, 2\]"):
        MuonWithAdamW([{"params": [nn.Parameter(torch.zeros(2, 2, 2))], "hidden": True}])
    for settings in ({"momentum": 1.0}, {"betas": (0.9, 2.0)}, {"ns_steps": 0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}"):
            MuonWithAdamW([nn.Parameter(torch.zeros(2, 2))], **settings)
