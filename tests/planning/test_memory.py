"""The simulated step against arithmetic by hand, and against the memory of real training."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig

from lit_alignment.models.loading import BackboneConfig, load_tokenizer
from lit_alignment.models.tokens import NewTokenConfig, TokensConfig
from lit_alignment.planning.memory import LiveMemory, Workload, step_memory
from tests.helpers import ROOT
from tests.planning.memory_script import ADAPTERS, LENGTH

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


def simulated(folder, kind="full", workload=None, tokens=TokensConfig(), **backbone):  # noqa: B008
    base = BackboneConfig(folder, gradient_checkpointing=kind == "checkpointing", **backbone)
    tokenizer, added = load_tokenizer(base, tokens)
    if workload is None:
        workload = Workload([], 1, LENGTH) if kind == "prefix" else Workload([LENGTH])
    return step_memory(base, tokenizer, workload, tokens=tokens, added=added, peft=ADAPTERS[kind], adapter=None)


def test_weights_gradients_and_moments_are_counted_exactly(folder):
    found = simulated(folder)
    assert found.parameters == found.trainable == PARAMETERS
    assert found.gradients == 4 * PARAMETERS and found.optimizer == 8 * PARAMETERS
    assert 4 * PARAMETERS <= found.weights < 4 * PARAMETERS + 1000  # the rotary frequencies are a buffer
    assert found.largest_layer == 4 * (4 * D * D + 3 * D * F + 2 * D)


def test_only_adapters_have_gradients_and_moments(folder):
    found = simulated(folder, "lora")
    rank = 8
    adapters = LAYERS * rank * (4 * (D + D) + 3 * (D + F))
    assert found.trainable == adapters and found.parameters == PARAMETERS + adapters
    assert found.gradients == 4 * adapters and found.optimizer == 8 * adapters


def test_half_precision_halves_the_weights(folder):
    full, half = simulated(folder), simulated(folder, dtype="bfloat16")
    assert half.gradients == full.gradients / 2
    assert half.activations == pytest.approx(full.activations / 2, rel=0.15)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing(folder):
    whole, half = simulated(folder), simulated(folder, workload=Workload([LENGTH // 2]))
    assert whole.activations == pytest.approx(2 * half.activations, rel=0.02)
    assert simulated(folder, "checkpointing").activations < whole.activations / 10


def test_documents_of_a_packed_row_cost_no_square(folder):
    one, many = simulated(folder, workload=Workload([LENGTH])), simulated(folder, workload=Workload([128] * 16))
    assert many.activations == pytest.approx(one.activations, rel=0.1)


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
@pytest.mark.parametrize("kind", ADAPTERS)
def test_estimate_is_within_15_percent_of_what_training_takes(kind, folder):
    """Each tensor gets pages of its own: a malloc that keeps what is freed would be measured along with them."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.planning.memory_script", kind, folder],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(result.stdout.strip().splitlines()[-1])
    assert simulated(folder, kind).total == pytest.approx(measured, rel=0.15)


def test_lora_on_every_kind_of_start_is_simulated(folder):
    base = BackboneConfig(folder)
    tokenizer, _ = load_tokenizer(base, TokensConfig())
    peft = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    found = step_memory(base, tokenizer, Workload([64]), tokens=TokensConfig(), added={}, peft=peft, adapter=None)
    assert found.trainable == simulated(folder, "lora").trainable
