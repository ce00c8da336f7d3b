"""A mixture of experts trains with its router loss where its configuration asks for it."""

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lit_alignment.models.head import hidden_states
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.router import router_losses
from lit_alignment.modules.sft import SFTModule
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import DECODER_SIZE, ROOT, chats, sft_data, trainer
from tests.modules.test_trainer_settings import Losses

KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4},
}
WEIGHT = 3.0


def build(folder, kind, **settings):
    experts = {"num_experts_per_tok": 2, "router_aux_loss_coef": WEIGHT, "output_router_logits": True}
    AutoConfig.for_model(kind, **(DECODER_SIZE | KINDS[kind] | experts | settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(folder)
    torch.manual_seed(0)
    optimizer = OptimizerConfig(learning_rate=1e-12, schedule="constant", warmup=0)
    return SFTModule(BackboneConfig(str(folder), weights="random"), optimizer=optimizer)


def run(folder, module, **data):
    """Losses that are returned and logged, and the batches, of one pass; weights stand still."""
    losses, seen, returned = Losses(), [], []
    losses.log_metrics = lambda metrics, step=None: losses.found.setdefault(step, {}).update(metrics)
    step = module.training_step

    def spy(batch, batch_idx):
        seen.append(batch)
        returned.append(step(batch, batch_idx))
        return returned[-1]

    module.training_step = spy
    accumulate = data.pop("accumulate", 1)
    options = {"logger": losses, "log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
    trainer(folder, **options).fit(module, sft_data(module, chats(8, longest=20), **data))
    return [float(each) for each in returned], losses.found, seen


@torch.no_grad()
def router_loss(module, batch):
    """transformers' own, of a batch with its mask."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return float(module.network.eval()(**inputs).aux_loss)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_step_is_that_of_transformers(tmp_path, kind):
    """Without padding among the tokens that are routed."""
    module = build(tmp_path, kind)
    (returned,), logged, (batch,) = run(tmp_path, module, packing=False, batch_size=8)
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.read_at + 1] = batch.targets
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        found = module.network.eval()(**inputs, labels=labels)
    assert returned == pytest.approx(float(found.loss), rel=1e-5)
    assert logged[0]["train/router_loss"] == pytest.approx(float(found.aux_loss), rel=1e-5)
    assert logged[0]["train/loss"] == pytest.approx(float(found.loss) - WEIGHT * float(found.aux_loss), rel=1e-4)


def test_router_loss_of_a_window_is_a_mean_over_its_tokens(tmp_path):
    module = build(tmp_path, "mixtral")
    returned, logged, batches = run(tmp_path, module, packing=False, batch_size=2, accumulate=4)
    numbers = [float(batch.num_tokens) for batch in batches]
    expected = sum(router_loss(module, b) * n for b, n in zip(batches, numbers, strict=True)) / sum(numbers)
    assert logged[0]["train/router_loss"] == pytest.approx(expected, rel=1e-4)
    assert sum(returned) / 4 == pytest.approx(logged[0]["train/loss"] + WEIGHT * expected, rel=1e-4)
    # A packed row of all has the router loss of one batch.
    module = build(tmp_path, "mixtral")
    _, logged, _ = run(tmp_path, module, tokens_per_batch=4096)
    whole = build(tmp_path, "mixtral")
    _, padded, _ = run(tmp_path, whole, packing=False, batch_size=8)
    assert logged[0]["train/router_loss"] == pytest.approx(padded[0]["train/router_loss"], rel=1e-4)


def test_configuration_that_does_not_ask_for_it_gets_none(tmp_path):
    module = build(tmp_path, "mixtral", output_router_logits=False)
    _, logged, _ = run(tmp_path, module)
    assert "train/router_loss" not in logged[0]


def test_a_forward_pass_without_gradient_adds_no_router_loss(tmp_path):
    """As that of a reference or a teacher within a training step."""
    network = build(tmp_path, "mixtral").load_model()
    with router_losses() as found:
        hidden_states(network, input_ids=torch.arange(8)[None])
        with torch.no_grad():
            hidden_states(network, input_ids=torch.arange(8)[None])
    assert len(found) == 1
