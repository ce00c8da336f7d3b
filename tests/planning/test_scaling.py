"""The estimate on paper against what a run of two ranks sends, and against a published speed."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from lightning.pytorch import Callback
from transformers import AutoConfig

from lit_alignment import FSDP2Strategy
from lit_alignment.models.loading import BackboneConfig, decoder_flops_per_token
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.planning.memory import StepMemory, Workload, step_memory
from lit_alignment.planning.scaling import (
    Cluster,
    Sharing,
    attention_flops_per_token,
    fsdp_traffic,
    scale_point,
    sequence_bytes_per_token,
    tensor_bytes_per_token,
)
from tests.helpers import chats, sft_data, sft_module, trainer
from tests.helpers.ranks import run_on_ranks

EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_published_speed_of_lora_on_one_gpu_is_that_of_its_operations():
    """8B, LoRA, 4096 tokens on one H100: about 12,500 tokens/s at 402 TFLOP/s."""
    config = AutoConfig.for_model("llama", **EIGHT_B, head_dim=128, tie_word_embeddings=False)
    parameters, lora = 8_030_261_248, 41_943_040
    flops = decoder_flops_per_token(config, parameters + lora, lora) + attention_flops_per_token(32, 4096, 4096)
    assert 402e12 / flops == pytest.approx(12_500, rel=0.05)


sent = {"gathered": 0, "scattered": 0, "exchanged": 0, "summed": 0}


class Window(Callback):
    """Counts during the second micro-batch alone: the first sets things up."""

    def __init__(self):
        self.before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before, self.tokens = dict(sent), batch.input_ids.numel()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {name: sent[name] - self.before[name] for name in sent} | {"tokens": self.tokens}


def counted(name, function, of, times=1):
    """The function, the whole tensor of which is counted: what comes from, or goes to, the other rank."""

    def call(*arguments, **named):
        whole = named[of] if of in named else arguments[0]
        ranks = dist.get_world_size()
        sent[name] += times * whole.numel() * whole.element_size() * (ranks - 1) // ranks
        return function(*arguments, **named)

    return call


def count(folder, kind):
    """Bytes that a micro-batch of FSDP2 sends, on each of two ranks."""
    dist.all_gather_single = counted("gathered", dist.all_gather_single, "output")
    dist.reduce_scatter_single = counted("scattered", dist.reduce_scatter_single, "input")
    dist.all_to_all_single = counted("exchanged", dist.all_to_all_single, "input")
    funcol.all_reduce = counted("summed", funcol.all_reduce, "self", times=2)
    window = Window()
    sharing = {} if kind == "fsdp2" else {f"{kind}_parallel_size": 2}
    strategy = FSDP2Strategy(process_group_backend="gloo", **sharing)
    runner = trainer(folder, strategy=strategy, devices=2, max_steps=2, callbacks=[window])
    module = sft_module()
    runner.fit(module, sft_data(module, chats(8), packing=kind == "sequence", tokens_per_batch=512, batch_size=2))
    if runner.is_global_zero:
        torch.save(window.found, folder / f"{kind}.pt")


@pytest.mark.slow
def test_bytes_of_two_ranks_are_those_on_paper(tokenizer, tmp_path):
    run_on_ranks(count, tmp_path, "fsdp2")
    sent = torch.load(tmp_path / "fsdp2.pt")
    backbone = BackboneConfig("configs/tiny", weights="random")
    none = {"tokens": TokensConfig(), "added": {}, "peft": None, "adapter": None}
    memory = step_memory(backbone, tokenizer, Workload([], 2, 64), **none)
    gathered, scattered = fsdp_traffic(memory, 2)
    assert sent["gathered"] == pytest.approx(gathered, rel=0.02)
    assert sent["scattered"] == pytest.approx(scattered, rel=0.02)


def test_memory_falls_and_the_network_comes_to_decide():
    gib = 2**30
    memory = StepMemory(8 * gib, 8 * gib, 32 * gib, 32 * gib, 64 * gib, 6 * gib, gib, 0, gib, 2 * gib)
    cluster = Cluster(8, 4e14, 4.5e11, 2e10)
    points = [scale_point(memory, 5e10, 8192, cluster, devices, 0.5) for devices in (1, 8, 16, 1024)]
    assert [point.memory for point in points] == sorted((point.memory for point in points), reverse=True)
    assert points[0].gathered == points[0].scattered == 0 and points[0].seconds == points[0].compute
    assert points[1].communication < points[1].compute  # within a node it hides
    assert points[2].seconds > 2 * points[1].seconds  # a slow network does not
    assert points[3].tokens_per_second > 40 * points[2].tokens_per_second


@pytest.mark.slow
def test_bytes_of_two_ranks_that_share_a_micro_batch_are_those_on_paper(tmp_path):
    """The tiny model has 2 layers of width 64, with 4 query heads and 2 key heads of width 16, in float32."""
    for kind in ("sequence", "tensor"):
        run_on_ranks(count, tmp_path, kind)
    sequence, tensor = (torch.load(tmp_path / f"{kind}.pt") for kind in ("sequence", "tensor"))
    # A rank's slice is longer by one token if the row's length is odd.
    paper = sequence_bytes_per_token(2, 64, 32, 2, 4) * sequence["tokens"]
    assert sequence["exchanged"] == pytest.approx(paper, rel=0.01)
    assert sequence["summed"] == tensor["exchanged"] == 0
    assert tensor["summed"] == pytest.approx(tensor_bytes_per_token(2, 64, 7, 2, 4) * tensor["tokens"], rel=1e-6)


@pytest.mark.parametrize("shared", [{"sequence": 4}, {"tensor": 4}, {"sequence": 2, "tensor": 2}], ids=str)
def test_devices_that_share_a_micro_batch_divide_its_work_and_count_its_tokens_once(shared):
    """1000 tokens of 4e9 operations at 1e12 a second: 4 s on one device, 1 s on four; eight devices have two of them.

    Links are so fast that nothing but computing takes time.
    """
    memory = StepMemory(2**30, 2**20, 2**30, 2**30, 2**30, 2**30, 2**20, 0, 2**20, 2**20)
    cluster = Cluster(8, 1e12, 1e30, 1e30)
    alone = scale_point(memory, 4e9, 1000, cluster, 8)
    point = scale_point(memory, 4e9, 1000, cluster, 8, sharing=Sharing(**shared, bytes_per_token=100.0))
    assert alone.compute == pytest.approx(4) and alone.tokens_per_second == pytest.approx(8 * 1000 / 4)
    assert point.compute == pytest.approx(1) and point.seconds == pytest.approx(1)
    assert point.tokens_per_second == pytest.approx(2 * 1000 / 1) and point.exchanged == 100_000
