"""What tensor parallelism splits, and what it refuses."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers import AutoConfig, AutoModelForCausalLM

from lit_alignment.distributed.tensor_parallel import Replicated, layer_plan, split_plan
from lit_alignment.errors import ConfigError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def model(kind="llama", **lora):
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
        return get_peft_model(network, LoraConfig(target_modules="all-linear", **lora)) if lora else network


def test_factor_on_the_whole_side_of_a_matrix_stays_whole():
    plan = split_plan(model(r=4), 2)
    layer = "base_model.model.model.layers.0."
    kinds = {name.removeprefix(layer): type(style) for name, style in plan.items() if name.startswith(layer)}
    assert kinds["self_attn.q_proj.base_layer"] is kinds["self_attn.q_proj.lora_B.default"] is ColwiseParallel
    assert kinds["self_attn.q_proj.lora_A.default"] is Replicated
    assert kinds["mlp.down_proj.base_layer"] is kinds["mlp.down_proj.lora_A.default"] is RowwiseParallel
    assert kinds["mlp.down_proj.lora_B.default"] is kinds["input_layernorm"] is Replicated
    assert isinstance(plan["base_model.model.lm_head"], Replicated)


def test_what_cannot_be_split_is_refused_by_name():
    with pytest.raises(ConfigError, match="size is 4, by which 2 heads cannot be divided"):
        layer_plan(model().config, 4)
    with pytest.raises(ConfigError, match=r"q_norm cannot be split|no plan for qwen3"):
        split_plan(model("qwen3"), 2)
    with pytest.raises(ConfigError, match="no plan for gpt2"):
        layer_plan(AutoConfig.for_model("gpt2"), 2)
    with pytest.raises(ConfigError, match=r"lora_magnitude_vector.* cannot be split"):
        split_plan(model(r=4, use_dora=True), 2)
    with pytest.raises(ConfigError, match="cannot be split"):
        split_plan(model(r=4, trainable_token_indices=[1, 2]), 2)
