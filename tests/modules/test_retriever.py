"""The retriever by itself: vectors, and the contrastive warm-up."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel

from lit_alignment import RetrieverDataModule, RetrieverModule
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.models.dual_encoder import RetrieverConfig, load_retriever, pool
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import RETRIEVER, knowledge, trainer
from tests.helpers.waits import Waits

TEXTS = ["order", "the kitchen scale does not work please reply", "a b c d e f g h " * 40]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vector_does_not_depend_on_what_else_is_in_the_batch(pooling):
    encoder = load_retriever(replace(RETRIEVER, pooling=pooling))
    with torch.no_grad():
        together = encoder.queries(TEXTS)
        alone = torch.cat([encoder.queries([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def test_padding_of_an_encoder_that_looks_both_ways_is_not_looked_at():
    """As BERT's: texts of one length are encoded without a mask, those of several with one; the GPU is not asked."""
    config = BertConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    encoder = load_retriever(RETRIEVER)
    tower = BertModel(config, add_pooling_layer=False).eval()
    ids = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    with torch.no_grad(), Waits() as waits:
        together = encoder._vectors(tower, ids)
        alone = torch.cat([encoder._vectors(tower, [each]) for each in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not waits.places


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [9.0]], [[4.0], [5.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[1.5], [5.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0], [4.0]]
    assert pool(hidden, mask, "last").tolist() == [[2.0], [6.0]]


def test_long_query_keeps_its_prefix_and_end_and_a_passage_its_start():
    settings = replace(RETRIEVER, query_prefix="query: ", passage_prefix="passage: ", query_max_length=12)
    encoder = load_retriever(replace(settings, passage_max_length=12))
    words = " ".join(str(i) for i in range(30))
    tokenizer = encoder.tokenizer
    query = tokenizer.decode(encoder._ids([words], "query: ", 12, keep_end=True)[0], skip_special_tokens=True)
    passage = tokenizer.decode(encoder._ids([words], "passage: ", 12, keep_end=False)[0], skip_special_tokens=True)
    assert query.startswith("query: ") and query.endswith("29") and " 0 " not in query
    assert passage.startswith("passage: ") and "0 1" in passage and "29" not in passage
    assert all(len(encoder._ids([words], p, 12, keep_end=True)[0]) <= 12 for p in ("query: ", ""))


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="temperature is 0"):
        RetrieverConfig("x", temperature=0)
    with pytest.raises(ConfigError, match="set retriever.towers to separate"):
        RetrieverConfig("x", passage_path="y")


def questions(number):
    return [{"query": p.text, "positive": {"title": p.title, "text": p.text}} for p in knowledge(number)]


def warm_up(folder, records, **options):
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)
    module = RetrieverModule(replace(RETRIEVER, towers="separate"), optimizer=optimizer)
    sources = [SourceConfig(records=records, name="questions")]
    data = RetrieverDataModule(module.tokenizer, train=sources, val=sources, batch_size=8, packing=False)
    runner = trainer(folder, **options)
    runner.fit(module, data)
    return runner


def test_warm_up_brings_each_question_to_its_passage(tmp_path):
    records = [{"query": f"what is {i} {i}", "positive": f"it is number {i * 7 % 31}"} for i in range(8)]
    runner = warm_up(tmp_path, records, max_epochs=25)
    assert float(runner.callback_metrics["val/in_batch_accuracy"]) == 1
    assert float(runner.callback_metrics["val/loss"]) < 0.3


def test_copies_of_a_passage_are_no_negatives_of_each_other(tmp_path):
    """All questions have one passage: nothing is left to be told apart."""
    records = [{"query": f"question {i}", "positive": "the only passage"} for i in range(8)]
    runner = warm_up(tmp_path, records, max_epochs=1)
    assert float(runner.callback_metrics["val/loss"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "raw, message",
    [
        ("text", "the record is a string"),
        ({"positive": "x"}, "field 'query' is missing"),
        ({"query": "", "positive": "x"}, "field 'query' is empty"),
        ({"query": "x"}, "field 'positive' is missing"),
        ({"query": "x", "positive": ""}, "field 'text' is empty"),
        ({"query": "x", "positive": "y", "negatives": "z"}, "field 'negatives' is a string"),
    ],
)
def test_bad_question_is_named(raw, message):
    module = RetrieverModule(RETRIEVER)
    data = RetrieverDataModule(module.tokenizer, packing=False)
    with pytest.raises(RecordError, match=f"q.jsonl:3: .*{message}"):
        data.read(raw, "q.jsonl:3", 2)
