"""Questions, their passages, and what the retriever is asked."""

import pytest

from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.example import Dropped
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.passages import Passage, format_passage, read_passage
from lit_alignment.data.rag import PassagePlacementConfig, RAGEncoder, query_text
from lit_alignment.errors import ConfigError, RecordError
from tests.helpers import encoded_index, knowledge, rag_data, rag_module, record, table

PASSAGES = [Passage("a", "scale", "the scale is red"), Passage("b", text="order it")]


def rag_encoder(tokenizer, placement=None, **settings):
    made = RAGEncoder(tokenizer, EncodingConfig(**settings))
    made.placement = placement or PassagePlacementConfig()
    return made


def shown(tokenizer, placement=None, passages=PASSAGES, **settings):
    encoder = rag_encoder(tokenizer, placement, **settings)
    asked, answer = encoder.split(record("what color?", "it is red"))
    return tokenizer.decode(encoder.example(asked, answer, passages).input_ids)


def test_passages_stand_before_the_question(tokenizer):
    text = shown(tokenizer)
    assert "scale\nthe scale is red\n\norder it\n\nwhat color?" in text


def test_passages_stand_after_the_question_or_in_the_system_message(tokenizer):
    after = shown(
        tokenizer, PassagePlacementConfig(block="{message}\n{passages}", separator=" // ", passage="{title}: {text}")
    )
    assert "what color?\nscale: the scale is red // order it" in after
    system = shown(tokenizer, PassagePlacementConfig(place="system"))
    assert system.index("scale\nthe scale is red\n\norder it") < system.index("what color?")
    assert "order it\n\n" not in system


def test_documents_go_to_a_template_that_takes_them(tokenizer):
    source = (
        "{% for d in documents or [] %}<{{ d.title }}:{{ d.text }}>{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    own = TemplateConfig(file=None)
    encoder = rag_encoder(tokenizer, PassagePlacementConfig(place="documents"), template=own)
    encoder.template.sources = {"default": source}
    asked, answer = encoder.split(record("what color?", "it is red"))
    text = tokenizer.decode(encoder.example(asked, answer, PASSAGES).input_ids)
    assert text.startswith("<scale:the scale is red><:order it>[user]what color?")
    assert "<scale" not in tokenizer.decode(encoder.example(asked, answer, []).input_ids)


def test_last_response_alone_is_trained_and_is_the_same_after_any_passages(tokenizer):
    encoder = rag_encoder(tokenizer)
    asked, answer = encoder.split(record("hi", "hello", "what color?", "it is red"))
    examples = [encoder.example(asked, answer, found) for found in ([], PASSAGES, PASSAGES[1:])]
    trained = [[label for label in example.labels if label != -100] for example in examples]
    assert trained[0] == trained[1] == trained[2]
    assert tokenizer.decode(trained[0]).startswith("it is red")
    assert "[hello]" not in table(tokenizer, examples[1])


def test_prompt_of_predict_is_what_training_saw_before_the_answer(tokenizer):
    encoder = rag_encoder(tokenizer)
    asked, answer = encoder.split(record("hi", "hello", "what color?", "it is red"))
    example = encoder.example(asked, answer, PASSAGES)
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    assert encoder.prompt(asked, PASSAGES).input_ids == example.input_ids[:first]


def test_passages_are_cut_until_all_fits_and_the_question_never(tokenizer):
    long = [Passage(str(i), "t", "the scale is red " * 50) for i in range(3)]
    encoder = rag_encoder(tokenizer, max_length=120)
    asked, answer = encoder.split(record("what color?", "it is red"))
    example = encoder.example(asked, answer, long)
    assert 100 < len(example.input_ids) <= 120
    text = tokenizer.decode(example.input_ids)
    assert "what color?" in text and "it is red" in text and text.count("t\nthe scale") == 3
    assert shown(tokenizer, PassagePlacementConfig(max_tokens=2), long[:1]).count("scale") <= 1


def test_braces_in_a_message_are_kept(tokenizer):
    encoder = rag_encoder(tokenizer)
    asked, answer = encoder.split(record("what is {x} or {passages}?", "red"))
    assert "what is {x} or {passages}?" in tokenizer.decode(encoder.example(asked, answer, PASSAGES).input_ids)


@pytest.mark.parametrize("query", ["last_user", "dialogue"])
def test_answer_never_reaches_the_query(query, tokenizer, tmp_path):
    """Nor do passages, or anything that follows."""
    chat = record("first question", "first answer", "second question", "THE ANSWER", "third question")
    encoder = rag_encoder(tokenizer)
    asked, _ = encoder.split(chat)
    expected = {"last_user": "second question", "dialogue": "first question\nfirst answer\nsecond question"}
    assert query_text(asked, query) == expected[query]
    module = rag_module(encoded_index(tmp_path, knowledge(3)), num_passages=2)
    data = rag_data(module, [{"messages": chat.messages}], query=query)
    row = data.encode_record(chat, data.sources["train"][0])
    assert row["query"] == expected[query] and "THE ANSWER" not in row["messages"]


def test_what_cannot_be_trained_is_dropped_with_its_reason(tokenizer):
    encoder = rag_encoder(tokenizer)
    untrained = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    chat = record("a", "b")
    chat.messages = untrained
    for given, reason in ((record("only a question"), "no_trained_message"), (chat, "no_trained_message")):
        with pytest.raises(Dropped, match=reason):
            encoder.split(given)


@pytest.mark.parametrize(
    "raw, message",
    [
        (3, "the passage is a number"),
        ({"title": "x"}, r"field 'text' is missing .found: 'title'"),
        ({"text": "  "}, "field 'text' is empty"),
        ({"text": 3}, "field 'text' is a number"),
        ({"text": "x", "title": ["y"]}, "field 'title' is a list"),
        ({"text": "x", "id": 1.5}, "field 'id' is a number"),
    ],
)
def test_bad_passage_names_file_line_and_field(raw, message):
    with pytest.raises(RecordError, match=f"notes.jsonl:7: .*{message}"):
        read_passage(raw, "notes.jsonl:7", 6)


def test_passage_is_written_without_quotes_and_without_an_empty_title():
    assert format_passage("{title} / {text}", '"Aaron"', '"a prophet"') == "Aaron / a prophet"
    assert format_passage("{title} / {text}", "", "a prophet") == "a prophet"
    assert read_passage("plain text", "notes.jsonl:1", 4).id == "4"


@pytest.mark.parametrize("form", ["{title}", "{text} {author}", "{0}", "{"])
def test_form_that_loses_the_text_is_refused(form):
    with pytest.raises(ConfigError, match=r"placement.passage is"):
        PassagePlacementConfig(passage=form)


def test_block_that_loses_something_is_refused():
    with pytest.raises(ConfigError, match="placement.block"):
        PassagePlacementConfig(block="{passages}")
    with pytest.raises(ConfigError, match="truncation_unit"):
        RAGEncoder(None, EncodingConfig(truncation_unit="tokens"))


def test_relevant_that_is_no_list_is_named(tmp_path):
    module = rag_module(encoded_index(tmp_path, knowledge(3)), num_passages=2)
    data = rag_data(module, [])
    with pytest.raises(RecordError, match=r"x:1: field 'relevant' is a string"):
        data.read({"messages": [{"role": "user", "content": "a"}], "relevant": "p1"}, "x:1", 0)
