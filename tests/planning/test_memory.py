"""The simulated step against arithmetic by hand, and against the memory of real training."""

import ctypes
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, PrefixTuningConfig
from transformers import AutoTokenizer, LlamaConfig

from lit_alignment import SFTDataModule, SFTModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.loading import BackboneConfig, load_tokenizer
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.planning.memory import LiveMemory, Workload, step_memory
from tests.helpers import ROOT, trainer
from tests.helpers.ranks import run_on_ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc
LENGTH = 2048
ADAPTERS = {
    "full": None,
    "checkpointing": None,
    "lora": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
}

EACH = ["full", "lora", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("checkpointing", "prefix"))]


def module_and_data(kind: str, folder: str) -> tuple[SFTModule, SFTDataModule]:
    words = ["kitchen scale order repair"] * 2000
    records = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{i} " + " ".join(words)}]}
        for i in range(4)
    ]
    backbone = BackboneConfig(folder, weights="random", gradient_checkpointing=kind == "checkpointing")
    module = SFTModule(backbone, ADAPTERS[kind])
    data = SFTDataModule(
        module.tokenizer,
        train=[SourceConfig(records=records)],
        encoding=EncodingConfig(max_length=LENGTH, truncation="keep_start", truncation_unit="tokens"),
        packing=kind != "prefix",
        batch_size=1,
        cache_dir=f"{folder}/cache",
    )
    return module, data


class Resident(Callback):
    """Resident bytes of the process before the model is loaded."""

    def setup(self, trainer, pl_module, stage):
        self.before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(kind, folder):
    """Bytes that two steps take beyond the libraries, in a process of their own, written into a file. Linux only.

    The first has no moments yet, and those after the second take no more than that.
    """
    # Each tensor gets pages of its own: a malloc that keeps what is freed is measured with them.
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_THRESHOLD, 65536) and libc.mallopt(M_TRIM_THRESHOLD, 65536)
    module, data = module_and_data(kind, folder)
    resident = Resident()
    trainer(Path(folder), callbacks=[resident], max_steps=2, max_epochs=-1).fit(module, data)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident.before
    (Path(folder) / "taken.json").write_text(json.dumps(taken))


V, D, F, LAYERS = 16_000, 512, 1408, 8
MATRICES = LAYERS * (4 * D * D + 3 * D * F) + 2 * V * D
PARAMETERS = MATRICES + LAYERS * 2 * D + D


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(tmp_path)
    return str(tmp_path)


def simulated(
    folder,
    kind="full",
    workload=None,
    tokens=TokensConfig(),  # noqa: B008
    device="cpu",
    device_memory=None,
    **backbone,
):
    base = BackboneConfig(folder, **({"gradient_checkpointing": kind == "checkpointing"} | backbone))
    tokenizer, added = load_tokenizer(base, tokens)
    if workload is None:
        workload = Workload([], 1, LENGTH) if kind == "prefix" else Workload([LENGTH])
    settings = {"peft": ADAPTERS[kind], "adapter": None, "device_type": device, "device_memory": device_memory}
    return step_memory(base, tokenizer, workload, tokens=tokens, added=added, **settings)


def test_weights_gradients_and_moments_are_counted_exactly(folder):
    found = simulated(folder)
    assert found.parameters == found.trainable == PARAMETERS
    assert found.gradients == 4 * PARAMETERS and found.optimizer == 8 * PARAMETERS
    assert 4 * PARAMETERS <= found.weights < 4 * PARAMETERS + 1000  # the rotary frequencies are a buffer
    assert found.largest_layer == 4 * (4 * D * D + 3 * D * F + 2 * D)


@pytest.mark.slow
def test_keys_and_values_of_a_rollout_are_counted_exactly(folder):
    """Two of each token and layer, D wide, in every sequence that is generated together."""
    sampling = replace(Workload([64]), sampled=16, sampled_length=300)
    found = simulated(folder, workload=sampling)
    assert found.keys_values == 16 * 300 * LAYERS * 2 * D * 4
    mixed = simulated(folder, workload=replace(sampling, autocast=torch.bfloat16))
    assert mixed.keys_values == found.keys_values * 3 / 4  # keys are turned by their positions in float32
    half = simulated(folder, workload=sampling, dtype="bfloat16")
    assert half.keys_values == found.keys_values / 2
    step = found.activations + found.loss + found.temporary
    assert found.keys_values > step  # of 64 tokens alone
    assert found.total == found.weights + found.gradients + found.optimizer + found.keys_values
    short = simulated(folder, workload=replace(sampling, sampled=1))
    assert short.keys_values < step and short.total == short.weights + short.gradients + short.optimizer + step


@pytest.mark.slow
def test_only_adapters_have_gradients_and_moments(folder):
    found = simulated(folder, "lora")
    rank = 8
    adapters = LAYERS * rank * (4 * (D + D) + 3 * (D + F))
    assert found.trainable == adapters and found.parameters == PARAMETERS + adapters
    assert found.gradients == 4 * adapters and found.optimizer == 8 * adapters


@pytest.mark.slow
def test_half_precision_halves_the_weights(folder):
    full, half = simulated(folder), simulated(folder, dtype="bfloat16")
    assert half.gradients == full.gradients / 2
    assert half.activations == pytest.approx(full.activations / 2, rel=0.15)


@pytest.mark.slow
def test_activations_grow_with_tokens_and_shrink_with_checkpointing(folder):
    whole, half = simulated(folder), simulated(folder, workload=Workload([LENGTH // 2]))
    assert whole.activations == pytest.approx(2 * half.activations, rel=0.02)
    assert simulated(folder, "checkpointing").activations < whole.activations / 10


@pytest.mark.slow
def test_each_kind_of_checkpointing_keeps_what_it_says(folder):
    def activations(kind, **settings):
        return simulated(folder, gradient_checkpointing=kind, device="cuda", **settings)

    none, full, attention = activations("none"), activations("full"), activations("selective")
    half = activations("selective", selective=2)
    offload = activations("full", activation_offload=True)
    hidden = LENGTH * D * 4  # bytes of a layer's input
    assert half.activations == pytest.approx((none.activations + full.activations) / 2, rel=0.02)
    # The output of a layer's attention is as large as its input; beside it is one number for each head and position.
    assert attention.activations - full.activations == pytest.approx(LAYERS * hidden * (1 + 8 / D), rel=0.02)
    assert full.activations - offload.activations == offload.offloaded == (LAYERS - 1) * hidden
    assert full.offloaded == 0 and offload.weights == full.weights


@pytest.mark.slow
def test_documents_of_a_packed_row_cost_no_square(folder):
    one, many = simulated(folder, workload=Workload([LENGTH])), simulated(folder, workload=Workload([128] * 16))
    assert many.activations == pytest.approx(one.activations, rel=0.1)


@pytest.mark.slow
def test_quantised_weights_take_half_a_byte(folder):
    plain, small = simulated(folder, "lora"), simulated(folder, "lora", quantization="nf4")
    linear = LAYERS * (4 * D * D + 3 * D * F)
    assert plain.weights - small.weights == pytest.approx(linear * (4 - 4.127 / 8), rel=1e-3)


def test_new_tokens_are_counted(folder):
    tokens = TokensConfig(new={"<a>": NewTokenConfig("text", "kitchen")}, pad_vocabulary_to=128)
    assert simulated(folder, tokens=tokens).parameters == PARAMETERS  # 16,000 rows are enough
    wide = TokensConfig(pad_vocabulary_to=16_384)
    assert simulated(folder, tokens=wide).parameters == PARAMETERS + 2 * 384 * D


def test_live_memory_counts_a_storage_once_and_forgets_it():
    memory = LiveMemory()
    with memory:
        a = torch.zeros(1000)
        view = a[:10]
        assert memory.current == 4000
        b = a + 1
        assert memory.current == 8000
        del a, view
        assert memory.current == 4000 and memory.peak == 8000
    assert b.sum() == 1000


@pytest.mark.slow
@pytest.mark.parametrize("kind", EACH)
def test_estimate_is_within_15_percent_of_what_training_takes(kind, folder):
    run_on_ranks(peak, kind, folder, ranks=1)
    measured = json.loads((Path(folder) / "taken.json").read_text())
    assert simulated(folder, kind).total == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_logits_are_counted_in_the_chunks_that_a_gpu_has_room_for(folder):
    """A sixteenth of what is free beside weights and activations, in the first step, at 16 bytes a logit."""

    def gpu(memory):
        return simulated(folder, "lora", Workload([2048]), device="cuda", device_memory=memory)

    least = gpu(0)  # chunks of 256
    beside, chunk = least.weights + least.activations, 512 * V * 16 * 16
    one, two, three = (gpu(beside + room).loss for room in (chunk, 2 * chunk - 1, 2 * chunk))
    assert one == two > least.loss
    assert three - one == pytest.approx(2 * (one - least.loss), rel=0.02)  # 512 positions more, after 256
    assert 4 * V <= (three - one) / 512 <= 16 * V


@pytest.mark.slow
def test_lora_on_every_kind_of_start_is_simulated(folder):
    base = BackboneConfig(folder)
    tokenizer, _ = load_tokenizer(base, TokensConfig())
    peft = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    found = step_memory(base, tokenizer, Workload([64]), tokens=TokensConfig(), added={}, peft=peft, adapter=None)
    assert found.trainable == simulated(folder, "lora").trainable
