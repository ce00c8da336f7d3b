"""Under every precision, sums stay sums: metrics, positions and the weights of a batch are not rounded."""

import pytest
import torch
from torchmetrics import MeanMetric, Metric, MetricCollection, MinMaxMetric

from tests.helpers import (
    chats,
    encoded_index,
    knowledge,
    pairs,
    rag_data,
    rag_module,
    reward_data,
    reward_model,
    sft_data,
    sft_module,
    trainer,
)

PRECISIONS = ["bf16-true", "16-true", "bf16-mixed", "64-true"]


class Nested(Metric):
    """A metric with others in it, one of them a list."""

    def __init__(self):
        super().__init__()
        self.inner = MetricCollection({"mean": MeanMetric(), "best": MinMaxMetric(MeanMetric())})
        self.add_state("values", [torch.ones(2)] * 0, dist_reduce_fx="cat")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value):
        self.total += value
        self.values.append(torch.full((2,), float(value)))
        self.inner.update(value)

    def compute(self):
        return self.total


def floats(module):
    """Precision of each state of each metric, and of each buffer that no checkpoint has."""
    for each in module.modules():
        if isinstance(each, Metric):
            states = [getattr(each, name) for name in each._defaults]
            yield from (s.dtype for part in states for s in (part if isinstance(part, list) else [part]))
        for name in each._non_persistent_buffers_set:
            yield each._buffers[name].dtype


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validation_loss_does_not_depend_on_the_batches(tmp_path, precision):
    """In batches of one record, with a sum that half precision could not hold."""
    found = []
    for batch_size in (1, 350):
        module = sft_module()
        data = sft_data(module, chats(2), chats(350, longest=3), packing=False, batch_size=batch_size)
        runner = trainer(tmp_path, precision=precision)
        (result,) = runner.validate(module, data, verbose=False)
        assert set(floats(module)) <= {torch.float32, torch.float64, torch.int64}
        found.append(result["val/loss"])
    # The networks compute in half precision; the rows of a large batch are rounded as those of a small one.
    assert found[0] == pytest.approx(found[1], rel=1e-3 if "true" in precision and "64" not in precision else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nested_metrics_and_positions_keep_their_precision_when_a_module_is_cast(dtype):
    module = sft_module()
    module.load_model()
    rotary = [m for m in module.modules() if "inv_freq" in dict(m.named_buffers(recurse=False))]
    before = [m.inv_freq.clone() for m in rotary]
    module.nested = Nested()
    module.nested.update(torch.tensor(0.1))
    module.to(dtype)
    assert module.network.lm_head.weight.dtype == dtype
    assert set(floats(module)) <= {torch.float32, torch.float64, torch.int64}
    assert rotary and all(torch.equal(m.inv_freq, value) for m, value in zip(rotary, before, strict=True))
    module.nested.update(torch.tensor(0.2))
    module.nested.reset()
    module.nested.update(torch.tensor(1 / 3))
    assert module.nested.compute().dtype == torch.float32 and float(module.nested.compute()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_scoring_methods_train_in_half_precision(tmp_path, precision):
    model = reward_model()
    trainer(tmp_path, precision=precision, max_steps=2).fit(model, reward_data(model, pairs(6), pairs(3, seed=1)))
    assert torch.isfinite(model.trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_weights_of_a_batch_are_not_rounded(tmp_path, precision):
    """A weight of 0.3 in bfloat16 is 0.30078."""
    module, seen = sft_module(), []
    records = [{**each, "messages": [{**m, "weight": 0.3} for m in each["messages"]]} for each in chats(2)]
    step = module.step
    module.step = lambda batch, stage: seen.append(batch.weights) or step(batch, stage)
    trainer(tmp_path, precision=precision, max_steps=1).fit(module, sft_data(module, records))
    assert seen[0].dtype == torch.float32 and (seen[0] - 0.3).abs().max() < 1e-7


def test_gradients_are_clipped_under_mixed_precision(tmp_path, monkeypatch):
    """Lightning refuses to clip where it takes the fused kernel for one that unscales gradients itself."""
    module, norms, step = sft_module(), [], torch.optim.AdamW.step

    def measured(self, closure):
        loss = closure()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
        step(self)
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    runner = trainer(tmp_path, precision="bf16-mixed", max_steps=1, gradient_clip_val=1e-3)
    runner.fit(module, sft_data(module, chats(2)))
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_index_is_not_stale_in_half_precision(tmp_path):
    """The retriever's weights stay as those that made the index; the generator's are cast."""
    module = rag_module(encoded_index(tmp_path, knowledge(6)), num_passages=2)
    trainer(tmp_path, precision="bf16-true", max_steps=1).fit(module, rag_data(module, chats(4), chats(2, seed=1)))
    assert next(module.network.parameters()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in module.dual.parameters()} == {torch.float32}
