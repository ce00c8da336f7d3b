"""Compiled, recomputed and offloaded layers on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from lit_alignment import MemorySnapshot
from lit_alignment.data.batching.collate import collate_packed, filled
from lit_alignment.data.encoding.example import Example
from lit_alignment.models.head import hidden_states
from lit_alignment.models.loading import BackboneConfig, load_network, load_tokenizer
from lit_alignment.models.logprobs import row_inputs
from lit_alignment.models.tokens import TokensConfig
from tests.helpers import chats, sft_data, sft_module, trainer

pytestmark = pytest.mark.gpu
PLAIN = BackboneConfig("configs/tiny", weights="random", dtype="float32", attention="sdpa")


def row(lengths):
    ids = [torch.arange(length).remainder(300).tolist() for length in lengths]
    return filled(collate_packed([Example(each, each, [1.0] * len(each)) for each in ids]), 4096, 0)


def step(backbone, rows):
    """Gradients of the last row, and bytes that existed between forward and backward pass."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(backbone, TokensConfig())[0]
    network = load_network(backbone, tokenizer, packing=True, device_type="cuda").cuda()
    for lengths in rows:
        network.zero_grad()
        before = torch.cuda.memory_allocated()
        hidden = hidden_states(network, **row_inputs(network, row(lengths)))
        kept = torch.cuda.memory_allocated() - before
        (hidden.square().sum() / 1000).backward()
    return {n: p.grad.cpu() for n, p in network.named_parameters() if p.grad is not None}, kept


def assert_close(found, expected, tolerance):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))


def test_recomputed_and_offloaded_layers_keep_less_and_give_the_same_gradients():
    modes = {
        "none": PLAIN,
        "save_attention": replace(PLAIN, gradient_checkpointing="selective"),
        "full": replace(PLAIN, gradient_checkpointing="full"),
        "offload": replace(PLAIN, gradient_checkpointing="full", activation_offload=True),
    }
    kept = {}
    expected, kept["none"] = step(modes.pop("none"), [[4096]])
    for name, backbone in modes.items():
        found, kept[name] = step(backbone, [[4096]])
        assert_close(found, expected, 1e-5)
    assert kept["none"] > kept["save_attention"] > kept["full"] > kept["offload"]


def test_compiled_layers_need_one_program_for_rows_of_any_documents():
    rows = [[4096], [1000, 3000], [100] * 30]
    expected, _ = step(PLAIN, rows)
    torch._dynamo.reset()
    counters.clear()
    found, _ = step(replace(PLAIN, compile=True), rows)
    assert_close(found, expected, 1e-3)
    assert 0 < counters["stats"]["unique_graphs"] <= 3 * 5  # of the 5 parts of a layer, compiled at most twice again


def test_snapshot_of_a_training_is_written(tmp_path):
    module = sft_module()
    path = tmp_path / "snapshot.pickle"
    runner = trainer(tmp_path, callbacks=[MemorySnapshot(str(path), 1)], accelerator="gpu", devices=1, max_steps=2)
    runner.fit(module, sft_data(module, chats(8), packing=False, batch_size=2))
    assert path.stat().st_size > 1000
