"""End-to-end RAG: objectives against enumeration, gradients of both sides, what is refused, and what it learns."""

import pytest
import torch

from lit_alignment.data.passages import format_passage
from lit_alignment.modules.rag import RAGModule
from tests.helpers import (
    assert_same_gradients,
    chats,
    encoded_index,
    knowledge,
    rag_data,
    rag_module,
    step_gradients,
    trainer,
)

OBJECTIVES = ["rag_sequence", "rag_token", "emdr2", "perplexity_distillation", "leave_one_out", "replug"]


def gradients(folder, records, knowledge_folder, lora=False, options=None, data=None, **settings):
    module = rag_module(encoded_index(knowledge_folder, knowledge(6)), lora, **settings)
    return step_gradients(folder, module, rag_data(module, records, **(data or {})), **(options or {}))


def slow_logps(module: RAGModule, encoder, item, passages) -> list[float]:
    """Log-probability of each answer token, from the full logits of one sequence by itself."""
    example = encoder.example(item.messages, item.answer, passages, item.tools)
    logits = module.network(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0].log_softmax(-1)
    return [logits[t - 1, label] for t, label in enumerate(example.labels) if label != -100 and t > 0]


def slow_loss(module: RAGModule, data, rows, objective: str) -> torch.Tensor:
    """The loss of one step by enumeration: every passage of the index, one question at a time."""
    passages, width = knowledge(6), module.retriever.temperature
    with torch.no_grad():
        stored = [module.encoder.passages([format_passage("{title} {text}", p.title, p.text)])[0] for p in passages]
    answers, own, tokens = [], [], 0
    for row in rows:
        item = data.predict_item(row, 0)
        query = module.encoder.queries([item.query])[0]
        scores = torch.stack([(query * vector).sum() / width for vector in stored])
        prior = scores.exp() / scores.exp().sum()
        single = [slow_logps(module, data.encoder, item, [p]) for p in passages]
        tokens += len(single[0])
        order = scores.argsort(descending=True)
        best_first = [passages[k] for k in order]
        whole = torch.stack([sum(logps) for logps in single])
        mean = (whole / len(single[0])).detach()
        match objective:
            case "rag_sequence":
                answers.append(-(prior * whole.exp()).sum().log())
                continue
            case "rag_token":
                by_token = [sum(prior[k] * single[k][t].exp() for k in range(6)) for t in range(len(single[0]))]
                answers.append(-sum(each.log() for each in by_token))
                continue
            case "emdr2":
                own.append(-(prior * whole.detach().exp()).sum().log())
            case "perplexity_distillation":
                target = mean.exp() / mean.exp().sum()
                own.append((target * (target / prior).log()).sum())
            case "leave_one_out":
                without = []
                for k in range(6):
                    left = [p for p in best_first if p is not passages[k]]
                    logps = slow_logps(module, data.encoder, item, left)
                    without.append((sum(logps) / len(logps)).detach())
                target = (-torch.stack(without)).exp() / (-torch.stack(without)).exp().sum()
                own.append((target * (target / prior).log()).sum())
            case "replug":
                target = mean.exp().exp() / mean.exp().exp().sum()
                own.append((prior * (prior / target).log()).sum())
        answers.append(-sum(slow_logps(module, data.encoder, item, best_first)))
    loss = sum(answers) / tokens
    return loss + sum(own) / len(own) if own else loss


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_equals_an_enumeration_over_all_passages(objective, packing, tmp_path):
    records = chats(3, longest=6)
    settings = {"objective": objective, "num_passages": 6}
    found = gradients(tmp_path, records, tmp_path, data={"packing": packing}, **settings)
    module = rag_module(encoded_index(tmp_path / "again", knowledge(6)), **settings)
    data = rag_data(module, records)
    trainer(tmp_path, max_steps=0).fit(module, data)
    slow_loss(module, data, data.examples["train"], objective).backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in expected} == {"model", "dual"}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("objective", ["rag_sequence", "rag_token", "perplexity_distillation"])
def test_accumulation_equals_one_big_batch(objective, lora, tmp_path):
    records = chats(8)
    settings = {"objective": objective, "num_passages": 3, "lora": lora}
    whole = gradients(tmp_path, records, tmp_path / "a", data={"batch_size": 8}, **settings)
    parts = gradients(
        tmp_path,
        records,
        tmp_path / "b",
        data={"batch_size": 2},
        options={"accumulate_grad_batches": 4},
        **settings,
    )
    assert_same_gradients(parts, whole)
    padded = gradients(tmp_path, records, tmp_path / "c", data={"batch_size": 8, "packing": False}, **settings)
    assert_same_gradients(padded, whole)
