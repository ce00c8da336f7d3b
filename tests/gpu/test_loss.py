import pytest
import torch

from lit_alignment.losses import linear_cross_entropy, linear_logps, token_cross_entropy
from lit_alignment.losses.chunks import CHUNK_SIZE, LARGEST_CHUNK, default_chunk_size
from tests.helpers import chats, sft_data, sft_module, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.filterwarnings("error:the loss is not compiled")
def test_compiled_loss_and_gradients_of_a_trained_head_equal_full_logits():
    """In bf16, of more than one chunk, whose last is shorter."""
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.1 * torch.randn(1000, 64, device="cuda")).bfloat16().requires_grad_()
    targets, weights = torch.randint(0, 1000, (300,), device="cuda"), torch.rand(300, device="cuda")
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights, chunk_size=128)
    expected, _ = token_cross_entropy(hidden.float() @ weight.float().T, targets, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    found, wanted = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, expected))
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 2e-2 * float(other.abs().max())
    logps = linear_logps(hidden, weight, targets, chunk_size=128)
    assert float(-(logps * weights).sum().detach()) == pytest.approx(float(loss.detach()), rel=1e-3)


def test_chunk_is_large_where_memory_is_free():
    assert CHUNK_SIZE <= default_chunk_size(torch.device("cuda"), 32_000) <= LARGEST_CHUNK


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_step_does_not_wait_for_the_device(packing, tmp_path):
    module = sft_module()
    data = sft_data(module, chats(6), packing=packing, **({} if packing else {"batch_size": 2}))
    runner = trainer(tmp_path, accelerator="gpu", devices=1, max_steps=2, max_epochs=2)
    runner.fit(module, data)  # compiles the loss
    batch = runner.strategy.batch_to_device(next(iter(data.train_dataloader())), torch.device("cuda"))
    module.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.training_step(batch, 0).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
