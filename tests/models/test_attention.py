"""Packed rows against separate documents, and back ends that cannot keep documents apart."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lit_alignment.data.batching.collate import Sequences, collate_packed, pack_sequences
from lit_alignment.data.encoding.example import Example
from lit_alignment.errors import ConfigError
from lit_alignment.losses import token_cross_entropy
from lit_alignment.models.attention import choose_attention, document_arguments, document_attention
from lit_alignment.models.head import check_head, head_loss, hidden_states, output_head
from tests.helpers import DECODER_SIZE

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 8.0},
    "gpt_neox": {},
    "phi": {},
}
LENGTHS = [5, 11, 1, 8]


def build(name, attention="sdpa"):
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(name, **(DECODER_SIZE | special | ARCHITECTURES[name]))
    implementation = choose_attention(attention, True, "cpu", config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval(), implementation


def packed_inputs():
    torch.manual_seed(1)
    documents = [torch.randint(3, 300, (1, n)) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return documents, torch.cat(documents, 1), positions


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_logits_equal_those_of_separate_documents(name):
    """The reference is transformers' own eager attention on one document at a time."""
    model, implementation = build(name)
    documents, row, positions = packed_inputs()
    arguments = document_arguments(implementation, LENGTHS, row.device)
    with torch.no_grad():
        packed = model(input_ids=row, position_ids=positions, use_cache=False, **arguments).logits
        model.set_attn_implementation("eager")
        separate = torch.cat([model(input_ids=document, use_cache=False).logits for document in documents], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_sliding_window_holds_without_packing_and_without_a_mask(name):
    model, _ = build(name)
    torch.manual_seed(1)
    rows = torch.randint(3, 300, (2, 11))
    with torch.no_grad():
        found = model(input_ids=rows, use_cache=False).logits
        model.set_attn_implementation("eager")
        expected = model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_responses_that_share_a_prompt_have_the_logits_of_whole_conversations(name):
    """The reference is transformers' own eager attention on the prompt with one response at a time."""
    model, implementation = build(name)
    torch.manual_seed(1)
    items = [
        Sequences(
            prompt=torch.randint(3, 300, (p,)).tolist(), responses=[torch.randint(3, 300, (n,)).tolist() for n in ns]
        )
        for p, ns in ((7, (3, 9)), (4, (5,)), (6, (1, 2, 8)))
    ]
    rows, begins = pack_sequences(items, share=True)
    assert rows.document_parents == [-1, 0, 0, -1, -1, 4, 4, 4] and rows.num_tokens == 7 + 12 + 9 + 6 + 11
    arguments = document_arguments(implementation, rows.document_lengths, rows.input_ids.device, rows.document_parents)
    inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "use_cache": False}
    with torch.no_grad():
        packed = model(**inputs, **arguments).logits[0]
        model.set_attn_implementation("eager")
        for begin, (item, response) in zip(begins, ((i, r) for i in items for r in i.responses), strict=True):
            whole = model(input_ids=torch.tensor([item.prompt + response]), use_cache=False).logits[0]
            found = packed[begin : begin + len(response)]
            torch.testing.assert_close(found, whole[len(item.prompt) :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "eager"])
def test_attention_that_cannot_share_a_prompt_is_refused(attention):
    with pytest.raises(ConfigError, match=r"cannot let responses of a row share one prompt|cannot train packed rows"):
        choose_attention(attention, True, "cuda", LlamaConfig(), shared_prompts=True)
    assert choose_attention("auto", True, "cuda", LlamaConfig(), shared_prompts=True) == "document_sdpa"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunked_loss_equals_the_model_s_own_logits(name):
    model, _ = build(name)
    _, row, positions = packed_inputs()
    check_head(model, row[:, :8])
    targets = torch.randint(3, 300, (row.shape[1],))
    logits = model(input_ids=row, position_ids=positions, use_cache=False).logits[0]
    expected, hits = token_cross_entropy(logits, targets)
    hidden = hidden_states(model, input_ids=row, position_ids=positions)[0]
    found, found_hits = head_loss(model, hidden, targets, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert int(hits) == int(found_hits)


def test_head_that_does_more_than_a_product_is_noticed():
    model, _ = build("llama")
    head = output_head(model)
    head.register_forward_hook(lambda module, inputs, output: output * 2)
    model.config.logit_scale = 3.0
    with pytest.raises(ConfigError, match="LlamaForCausalLM: its logits are not those of its output embedding"):
        check_head(model, torch.randint(3, 300, (1, 8)))


def test_document_gradients_do_not_leak():
    """The loss of one document has no gradient at another document's embeddings."""
    model, implementation = build("llama")
    _, row, positions = packed_inputs()
    embedded = model.get_input_embeddings()(row).detach().requires_grad_()
    arguments = document_arguments(implementation, LENGTHS, row.device)
    hidden = hidden_states(model, inputs_embeds=embedded, position_ids=positions, **arguments)
    hidden[:, 5:16].sum().backward()
    assert float(embedded.grad[:, :5].abs().sum()) == 0 == float(embedded.grad[:, 16:].abs().sum())
    assert float(embedded.grad[:, 5:16].abs().sum()) > 0


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_that_cannot_isolate_is_refused_with_those_that_can(attention):
    with pytest.raises(ConfigError, match=r"backbone.attention: \w+ .*Use one of: auto, sdpa; or set data's packing"):
        choose_attention(attention, True, "cpu", LlamaConfig())
    assert choose_attention(attention, False, "cpu", LlamaConfig()) == attention


def test_layers_that_carry_state_are_refused():
    config = LlamaConfig()
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="layers of kind linear_attention carry state"):
        choose_attention("auto", True, "cpu", config)


def test_soft_capped_scores_are_refused():
    part = torch.randn(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="soft-capped"):
        document_attention(torch.nn.Identity(), part, part, part, None, document_lengths=[4], softcap=50.0)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "varlen", "flash_attention_2", "flex_attention"])
def test_packed_equals_separate_on_gpu(attention):
    if attention in ("varlen", "flash_attention_2"):
        pytest.importorskip({"varlen": "torch.nn.attention.varlen"}.get(attention, "flash_attn"))
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **DECODER_SIZE)
    implementation = choose_attention(attention, True, "cuda", config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.bfloat16).cuda()
    documents, row, positions = packed_inputs()
    arguments = document_arguments(implementation, LENGTHS, torch.device("cuda"))
    with torch.no_grad():
        packed = model(input_ids=row.cuda(), position_ids=positions.cuda(), use_cache=False, **arguments).logits
        model.set_attn_implementation("eager")
        separate = torch.cat([model(input_ids=d.cuda(), use_cache=False).logits for d in documents], 1)
    torch.testing.assert_close(packed, separate, rtol=2e-2, atol=2e-2)


def test_packed_row_marks_documents():
    batch = collate_packed([Example([1, 2], [1, 2], [1.0, 1.0]), Example([3], [3], [1.0])])
    assert batch.document_lengths == [2, 1]
