"""Scores of every decoder are those of transformers' own classifier; divergences are those of both models' logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_alignment.data.batching.collate import Sequences, pack_sequences, pad_sequences
from lit_alignment.errors import ConfigError
from lit_alignment.losses import token_divergence
from lit_alignment.models import head
from lit_alignment.models.attention import choose_attention, document_arguments
from lit_alignment.models.head import head_divergence, hidden_states, scores_at
from tests.helpers import DECODER_SIZE

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {},
    "smollm3": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_transformers(name):
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3}
    config = AutoConfig.for_model(name, **(DECODER_SIZE | special | ARCHITECTURES[name]))
    implementation = choose_attention("auto", True, "cpu", config)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation).eval()
    conversations = [torch.randint(3, 300, (length,)).tolist() for length in (5, 11, 2, 8)]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in conversations])
        model.set_attn_implementation(implementation)
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in conversations])
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
        for rows, begins in (
            pack_sequences([Sequences([], [ids]) for ids in conversations], share=False),
            pad_sequences([Sequences([], [ids]) for ids in conversations], pad_token_id=0),
        ):
            ends = torch.tensor([begin + len(ids) - 1 for begin, ids in zip(begins, conversations, strict=True)])
            arguments = document_arguments(implementation, rows.document_lengths, rows.input_ids.device)
            inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
            if name not in ("opt",):  # counts positions by the mask
                inputs["position_ids"] = rows.position_ids
            if name == "opt" and rows.attention_mask is None:
                continue
            torch.testing.assert_close(scores_at(model, ends, **inputs, **arguments), expected, rtol=1e-4, atol=1e-5)


def test_model_without_a_layer_of_scores_on_a_decoder_is_refused():
    config = AutoConfig.for_model("bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ConfigError, match="BertForSequenceClassification has neither output embeddings nor a layer"):
        scores_at(model, torch.tensor([1]), input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("adapted", ["neither", "student", "teacher"])
def test_divergence_of_two_heads_is_that_of_their_logits(adapted, monkeypatch):
    """Of unequal width, scale, cap and number of rows; an adapter on a head makes it more than one product."""
    monkeypatch.setattr(head, "default_chunk_size", lambda device, vocabulary: 3)
    torch.manual_seed(0)
    models = {}
    for name, width, rows in (("student", 32, 300), ("teacher", 48, 310)):
        size = {"hidden_size": width, "vocab_size": rows, "head_dim": 8, "query_pre_attn_scalar": 8}
        config = AutoConfig.for_model("gemma2", **(DECODER_SIZE | size), final_logit_softcapping=2.0)
        model = AutoModelForCausalLM.from_config(config).eval()
        if name == adapted:
            peft = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
            model = get_peft_model(model, peft).eval()
        models[name] = model
    student, teacher = models.values()
    ids, weights = torch.randint(0, 300, (1, 8)), torch.linspace(0.5, 2, 8)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    logits = [model(input_ids=ids, use_cache=False).logits[0, :, :300] for model in (student, teacher)]
    expected = token_divergence(*logits, 0.3, 0.7)
    wanted = torch.autograd.grad((expected * weights).sum(), trained)
    states = [hidden_states(model, input_ids=ids)[0] for model in (student, teacher)]
    total, divergences = head_divergence(student, teacher, *states, weights, 0.3, 0.7)
    torch.testing.assert_close(divergences, expected.detach(), rtol=1e-4, atol=1e-6)
    for found, other in zip(torch.autograd.grad(total, trained), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    assert float(expected.min()) > 1e-4
