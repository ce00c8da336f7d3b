"""End-to-end RAG: objectives against enumeration, gradients of both sides, what is refused, and what it learns."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.callbacks.refresh import IndexRefresh
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.passages import format_passage
from lit_alignment.data.rag import PassagePlacementConfig
from lit_alignment.errors import ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.dual_encoder import DualEncoder
from lit_alignment.modules.rag import RAGModule
from lit_alignment.tools.evaluate import main as evaluate
from tests.helpers import (
    RETRIEVER,
    assert_same_gradients,
    base_model_folder,
    chats,
    encoded_index,
    knowledge,
    rag_data,
    rag_module,
    step_gradients,
    trainer,
)

SHARED = replace(RETRIEVER, towers="shared")
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
    passages, width = knowledge(6), module.passage_retriever.config.temperature
    encoder = module.passage_retriever.encoder
    with torch.no_grad():
        stored = [encoder.passages([format_passage("{title} {text}", p.title, p.text)])[0] for p in passages]
    answers, own, tokens = [], [], 0
    for row in rows:
        item = data.predict_item(row, 0)
        query = encoder.queries([item.query])[0]
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
    """In fp64: what trains the retriever is a small difference of sums over whole answers, which fp32 rounds."""
    records, double = chats(8), {"precision": "64-true"}
    settings = {"objective": objective, "num_passages": 3, "lora": lora}
    whole = gradients(tmp_path, records, tmp_path / "a", data={"batch_size": 8}, options=double, **settings)
    assert any(name.startswith("dual.query_tower.") for name in whole)
    split = double | {"accumulate_grad_batches": 4}
    parts = gradients(tmp_path, records, tmp_path / "b", data={"batch_size": 2}, options=split, **settings)
    assert_same_gradients(parts, whole)
    padded = {"batch_size": 8, "packing": False}
    assert_same_gradients(gradients(tmp_path, records, tmp_path / "c", data=padded, options=double, **settings), whole)


def test_dummy_question_trains_nothing(tmp_path):
    """What keeps a rank in step that has no question left."""
    module = rag_module(encoded_index(tmp_path, knowledge(6)), num_passages=3, objective="perplexity_distillation")
    data = rag_data(module, chats(3), batch_size=2)
    trainer(tmp_path, max_steps=0).fit(module, data)
    plan = data.plan("train")
    dummy = plan.batches(plan.groups(0), rank=2, world_size=3)[0]
    assert dummy.dummy and dummy.window_examples == 3
    seen = []
    module.step_loss = lambda loss_sum, weight: seen.append((float(loss_sum), weight)) or loss_sum
    module.log = lambda *args, **kwargs: None
    batch = data.collate([data.examples["train"][index] for index in dummy.indices], dummy)
    module.training_step(batch, 0)
    assert seen == [(0.0, dummy.window_weight), (0.0, 3)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_passages": 1}, "softmax over one passage is always 1"),
        ({"objective": "language_modeling"}, "language_modeling does not train a retriever"),
        ({"train_retriever": "none", "objective": "emdr2"}, "emdr2 is a loss of the retriever"),
        ({"train_retriever": "none", "train_generator": False}, "nothing would learn"),
        ({"retriever": SHARED}, "while the towers are shared"),
        ({"num_passages": 0}, "must be 1 or more"),
    ],
)
def test_settings_that_train_nothing_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        rag_module(encoded_index(tmp_path, knowledge(3)), **settings)


def test_missing_index_says_how_to_make_it(tmp_path):
    config = encoded_index(tmp_path, knowledge(3))
    module = rag_module(config)
    (tmp_path / "index/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="index build"):
        trainer(tmp_path).fit(module, rag_data(module, chats(2)))


def test_stale_index_is_refused_before_the_first_step(tmp_path):
    config = encoded_index(tmp_path, knowledge(3))
    manifest = tmp_path / "index/manifest.json"
    manifest.write_text(manifest.read_text().replace('"encoder_hash": "', '"encoder_hash": "0'))
    module = rag_module(config, num_passages=2)
    with pytest.raises(ConfigError, match="the index is stale: its passages were encoded with weights"):
        trainer(tmp_path).fit(module, rag_data(module, chats(2)))


def test_index_of_another_width_is_refused(tmp_path):
    config = encoded_index(tmp_path, knowledge(3))
    wider = base_model_folder(tmp_path / "wide", hidden_size=96)
    module = rag_module(config, retriever=replace(RETRIEVER, path=wider, weights="pretrained"), num_passages=2)
    with pytest.raises(ConfigError, match="vectors of 64 numbers .made by configs/tiny.*makes 96"):
        trainer(tmp_path).fit(module, rag_data(module, chats(2)))


def test_retriever_gradient_is_logged_and_is_not_zero(tmp_path):
    module = rag_module(encoded_index(tmp_path, knowledge(6)), num_passages=4)
    runner = trainer(tmp_path, max_steps=1)
    runner.fit(module, rag_data(module, [{**chat, "relevant": ["p3"]} for chat in chats(4)]))
    found = runner.callback_metrics
    assert float(found["train/retriever_grad_norm"]) > 0
    assert 0 < float(found["train/passage_entropy"]) <= math.log(4)
    assert 0 <= float(found["train/recall@1"]) <= 1


def test_frozen_retriever_is_asked_each_question_once(tmp_path, monkeypatch):
    """Two epochs, and validation on the same questions; the scores are those of a retriever that is asked again."""
    asked = []
    queries = DualEncoder.queries
    monkeypatch.setattr(DualEncoder, "queries", lambda self, texts: asked.extend(texts) or queries(self, texts))
    config = encoded_index(tmp_path, knowledge(6))
    module = rag_module(config, num_passages=3, train_retriever="none")
    trainer(tmp_path, max_epochs=2).fit(module, rag_data(module, chats(5), chats(5)))
    assert len(asked) == len(set(asked)) == 5
    again = rag_module(config, num_passages=3, train_retriever="query")
    again.passage_retriever.load()
    for one, other in zip(module.retrieve(asked[:3]), again.retrieve(asked[:3]), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other.detach())
        else:
            assert [[passage.id for passage in row] for row in one] == [
                [passage.id for passage in row] for row in other
            ]


def test_only_what_should_learn_changes(tmp_path):
    for learns, expected in (("none", set()), ("query", {"query_tower"}), ("both", {"query_tower", "passage_tower"})):
        module = rag_module(encoded_index(tmp_path / learns, knowledge(6)), num_passages=3, train_retriever=learns)
        callbacks = [IndexRefresh()] if learns == "both" else []
        found = step_gradients(tmp_path, module, rag_data(module, chats(4)), callbacks=callbacks)
        assert {name.split(".")[1] for name in found if name.startswith("dual.")} == expected
    module = rag_module(encoded_index(tmp_path / "frozen", knowledge(6)), num_passages=3, train_generator=False)
    found = step_gradients(tmp_path, module, rag_data(module, chats(4)))
    assert found and all(name.startswith("dual.query_tower.") for name in found)


def test_passages_that_learn_need_a_refresh(tmp_path):
    module = rag_module(encoded_index(tmp_path, knowledge(6)), num_passages=3, train_retriever="both")
    with pytest.raises(ConfigError, match="Add the callback lit_alignment.IndexRefresh"):
        trainer(tmp_path).fit(module, rag_data(module, chats(4)))


def test_shared_towers_learn_from_both_sides(tmp_path):
    config = encoded_index(tmp_path, knowledge(6), SHARED)
    module = rag_module(config, retriever=SHARED, num_passages=3, train_retriever="both")
    found = step_gradients(tmp_path, module, rag_data(module, chats(4)), callbacks=[IndexRefresh()])
    assert any(name.startswith("dual.query_tower.") for name in found)
    assert module.passage_retriever.encoder.query_tower is module.passage_retriever.encoder.passage_tower


def test_prompt_prefix_is_computed_once(tmp_path):
    """With the passages after the question, only what follows is repeated for each passage."""
    lengths = {}
    for block in ("{passages}\n\n{message}", "{message}\n\n{passages}"):
        module = rag_module(encoded_index(tmp_path / str(len(lengths)), knowledge(6)), num_passages=6)
        long = [
            {"messages": [{"role": "system", "content": " ".join(["be brief"] * 20)}, *chat["messages"]]}
            for chat in chats(3)
        ]
        data = rag_data(module, long, placement=PassagePlacementConfig(block=block))
        trainer(tmp_path, max_steps=0).fit(module, data)
        seen = []
        forward = module.network.forward
        module.network.forward = lambda *a, f=forward, s=seen, **k: (s.append(k["input_ids"].numel()), f(*a, **k))[1]
        items = [data.predict_item(row, 0) for row in data.examples["train"]]
        passages, scores = module.retrieve([item.query for item in items])
        module.losses(items, passages, scores)
        lengths[block] = sum(seen)
    repeated = sum(
        len(data.encoder.example(i.messages, i.answer, [p], i.tools).input_ids) for i in items for p in passages[0]
    )
    first, last = lengths["{passages}\n\n{message}"], lengths["{message}\n\n{passages}"]
    assert last < first < 0.7 * repeated


def answering(folder, decoding, **settings):
    """A module with its data, ready to answer, and the items that it is asked."""
    module = rag_module(encoded_index(folder, knowledge(6)), num_passages=3, decoding=decoding, **settings)
    data = rag_data(module, chats(3), chats(3, seed=1))
    trainer(folder, max_steps=0).fit(module, data)
    return module, data, data.predict_items(data.sources["predict"])


def likelihood(module, data, item, completion, passages, scores) -> float:
    """log sum over passages of p(passage) p(answer given it), one sequence at a time; a cut answer has no end."""
    said = replace(item, answer={"role": "assistant", "content": completion.text})
    encoder = data.encoder if completion.finish_reason == "stop" else data.encoder.without_end()
    prior = scores.log_softmax(-1)
    with torch.no_grad():
        each = [prior[k] + sum(slow_logps(module, encoder, said, [p])) for k, p in enumerate(passages)]
    return float(torch.stack(each).logsumexp(0))


def test_thorough_decoding_takes_the_candidate_that_all_passages_make_likely(tmp_path):
    module, data, items = answering(tmp_path, "rag_sequence")
    settings = DecodingConfig(max_new_tokens=4, num_beams=2, num_return_sequences=2, logprobs=True)
    responses = module.respond(items, settings)
    passages, scores = module.retrieve([item.query for item in items])
    for item, response, own, row in zip(items, responses, passages, scores, strict=True):
        found = [each.logp for each in response.completions]
        texts = {each.text for each in response.completions}
        assert found == sorted(found, reverse=True) and len(texts) == len(found)
        for completion in response.completions:
            expected = likelihood(module, data, item, completion, own, row.detach())
            assert completion.logp == pytest.approx(expected, rel=1e-4)
        assert [document["id"] for document in response.retrieved["documents"]] == [p.id for p in own]
        assert response.retrieved["doc_scores"] == pytest.approx(row.tolist())


def test_answer_that_the_limit_cut_is_as_likely_in_both_forms_of_decoding(tmp_path):
    """With one passage, the sum over passages is the likelihood of the tokens that were generated."""
    settings = DecodingConfig(max_new_tokens=3, logprobs=True)
    found = []
    for decoding in ("rag_sequence", "rag_sequence_fast"):
        module = rag_module(
            encoded_index(tmp_path / decoding, knowledge(6)), num_passages=1, decoding=decoding, train_retriever="none"
        )
        data = rag_data(module, chats(3), chats(8, seed=1))
        trainer(tmp_path, max_steps=0).fit(module, data)
        responses = module.respond(data.predict_items(data.sources["predict"]), settings)
        found.append([response.completions[0] for response in responses])
    compared = 0
    for thorough, fast in zip(*found, strict=True):
        ids = module.tokenizer(fast.text, add_special_tokens=False)["input_ids"]
        if fast.finish_reason == "length" and ids == fast.token_ids:  # the text is read as it was written
            assert thorough.logp == pytest.approx(fast.logp, rel=1e-4)
            compared += 1
    assert compared


def test_fast_decoding_asks_only_where_a_candidate_came_from(tmp_path):
    module, _, items = answering(tmp_path, "rag_sequence_fast")
    module.token_logps = None  # no second pass
    responses = module.respond(items, DecodingConfig(max_new_tokens=4, logprobs=True))
    assert all(len(response.completions) == 1 and response.completions[0].logp < 0 for response in responses)


def test_token_decoding_takes_the_likeliest_token_of_the_mixture(tmp_path):
    """Against full forward passes without a cache, passage by passage, under prompts of unequal lengths."""
    module, data, items = answering(tmp_path, "rag_token")
    responses = module.respond(items, DecodingConfig(max_new_tokens=5, logprobs=True, skip_special_tokens=False))
    passages, scores = module.retrieve([item.query for item in items])
    for item, response, own, row in zip(items, responses, passages, scores, strict=True):
        prompts = [data.encoder.prompt(item.messages, [p], item.tools).input_ids for p in own]
        tokens, total = [], 0.0
        while len(tokens) < 5 and not (tokens and tokens[-1] in module.stop.token_ids):
            with torch.no_grad():
                logps = [
                    module.network(input_ids=torch.tensor([p + tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
                    for p in prompts
                ]
            mixed = (row.detach().log_softmax(-1)[:, None] + torch.stack(logps)).logsumexp(0)
            tokens.append(int(mixed.argmax()))
            total += float(mixed.max())
        assert response.completions[0].text == module.tokenizer.decode(tokens)
        assert response.completions[0].logp == pytest.approx(total, rel=1e-4)


def test_token_decoding_knows_no_beams(tmp_path):
    module, _, items = answering(tmp_path, "rag_token")
    with pytest.raises(ConfigError, match="neither num_beams"):
        module.respond(items, DecodingConfig(num_beams=2))


def test_decoding_is_that_of_training_by_default(tmp_path):
    index = encoded_index(tmp_path, knowledge(3))
    for objective, expected in (("rag_sequence", "rag_sequence"), ("rag_token", "rag_token"), ("emdr2", "concatenate")):
        assert rag_module(index, objective=objective).decoding == expected


def test_predictions_carry_answer_reference_and_passages_and_can_be_evaluated(tmp_path, capsys):
    records = chats(4)
    module = rag_module(encoded_index(tmp_path, knowledge(6)), num_passages=2)
    writer = PredictionWriter(str(tmp_path / "out"))
    trainer(tmp_path, callbacks=[writer]).predict(module, rag_data(module, val=records), return_predictions=False)
    file = tmp_path / "out/greedy.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["label"] for line in lines] == [record["messages"][-1]["content"] for record in records]
    assert all(len(line["documents"]) == len(line["doc_scores"]) == 2 for line in lines)
    evaluate([str(file)])
    assert "exact_match" in capsys.readouterr().out


@pytest.mark.slow
def test_answers_belong_to_their_passages_and_where_these_stand(tmp_path, caplog):
    def predict(passages, **settings):
        module = rag_module(encoded_index(tmp_path, passages), num_passages=2)
        data, writer = rag_data(module, val=chats(4), **settings), PredictionWriter(str(tmp_path / "out"))
        caplog.clear()
        trainer(tmp_path, callbacks=[writer]).predict(module, data, return_predictions=False)
        return caplog.text

    predict(knowledge(6))
    assert "4 prompts are answered" in predict(knowledge(6))
    for settings in (
        {"placement": PassagePlacementConfig(place="system")},
        {"encoding": EncodingConfig(max_length=200)},
    ):
        assert "4 prompts of" in predict(knowledge(6), **settings)
    with pytest.raises(ConfigError, match=r"made with other settings \(index_files"):
        predict(knowledge(6, seed=1))


def test_retriever_weight_scales_the_gradient_of_the_retriever_alone(tmp_path):
    """In fp64: the retriever's gradient is a small difference, which fp32 rounds."""
    records, double = chats(3, longest=6), {"precision": "64-true"}
    found = {}
    for weight in (1.0, 3.0):
        settings = {"objective": "emdr2", "num_passages": 4, "retriever_weight": weight}
        found[weight] = gradients(tmp_path, records, tmp_path / str(weight), options=double, **settings)
    assert {name.split(".")[0] for name in found[1.0]} == {"model", "dual"}
    scaled = {name: 3 * value if name.startswith("dual.") else value for name, value in found[1.0].items()}
    assert_same_gradients(found[3.0], scaled)
