"""Questions and passages for a retriever: lengths, settings that play no part, and what is not there."""

import pytest

from lit_alignment import PassageDataModule, RetrieverDataModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.passages import Passage
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError

QUESTION = {"query": "the kitchen", "positive": {"title": "scale", "text": "the scale"}, "negatives": ["order", "bill"]}


def ids(tokenizer, *texts):
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def test_lengths_are_in_tokens_in_the_plan_and_in_the_report(tokenizer):
    data = RetrieverDataModule(tokenizer, train=[SourceConfig(records=[QUESTION, {**QUESTION, "negatives": []}])])
    data.setup("fit")
    short = ids(tokenizer, "the kitchen", "scale", "the scale")
    long = short + ids(tokenizer, "order", "bill")
    assert data.plan("train").lengths.tolist() == [long, short]
    assert data.reports["train"].tokens == long + short and data.reports["train"].longest == long

    passages = PassageDataModule(tokenizer, predict=[SourceConfig(records=[QUESTION["positive"]])])
    passages.setup("predict")
    assert passages.reports["predict"].tokens == ids(tokenizer, "scale", "the scale")


def test_tokenizer_without_a_chat_template_is_enough(tokenizer):
    tokenizer.chat_template = None
    data = RetrieverDataModule(tokenizer, train=[SourceConfig(records=[QUESTION])], encoding=EncodingConfig())
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.queries == ["the kitchen"]
    assert batch.passages == [("scale", "the scale"), ("", "order"), ("", "bill")]
    assert data.chat_template() is None and data.plan("train").tokens_per_batch is None


def test_passage_is_a_text_and_no_conversation(tokenizer):
    data = PassageDataModule(tokenizer, predict=[SourceConfig(records=[{"id": 7, "text": "a"}, "b"])], batch_size=2)
    assert data.read("b", "p.jsonl:2", 1) == Passage("1", text="b", where="p.jsonl:2")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert sorted((item.index, item.title, item.text) for item in batch.items) == [(0, "", "a"), (1, "", "b")]


def test_what_there_is_nothing_of_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="PassageDataModule has nothing to train on"):
        PassageDataModule(tokenizer, train=[SourceConfig(records=["a"])]).setup("fit")
    with pytest.raises(ConfigError, match="RetrieverDataModule has nothing to predict"):
        RetrieverDataModule(tokenizer, predict=[SourceConfig(records=[QUESTION])]).setup("predict")
