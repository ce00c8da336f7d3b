"""Every form of a record about responses is read to the same thing, and every mistake is named."""

import pytest

from lit_alignment.data.encoding.feedback import read_feedback
from lit_alignment.errors import RecordError
from tests.helpers import response_encoder

ASK = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


def read(**raw):
    return read_feedback(raw, "pairs.jsonl:3", 2)


def responses(record):
    return [(r["id"], r["messages"][-1]["content"], r["score"]) for r in record.responses]


@pytest.mark.parametrize(
    "raw",
    [
        {"context": [ASK], "chosen": GOOD, "rejected": BAD},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [ASK], "chosen": "good", "rejected": "bad"},
        {
            "context": [{"role": "user", "content": "q"}],
            "answer_w": {"role": "bot", "content": "good"},
            "answer_l": BAD,
        },
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},  # the prompt is what both begin with
        {"prompt": "q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
)
def test_every_form_of_a_pair_is_read_alike(raw):
    record = read(id=5, **raw)
    assert record.messages == [ASK] and record.id == "5"
    assert responses(record) == [("chosen", "good", 1.0), ("rejected", "bad", 0.0)]


def test_a_response_of_several_turns_follows_what_both_conversations_begin_with():
    more, other = {"role": "user", "content": "more"}, {"role": "user", "content": "less"}
    whole = read(chosen=[ASK, GOOD, more, GOOD], rejected=[ASK, GOOD, more, BAD])
    assert whole.messages == [ASK, GOOD, more] and responses(whole) == [
        ("chosen", "good", 1.0),
        ("rejected", "bad", 0.0),
    ]
    early = read(prompt="q", chosen=[GOOD, more, GOOD], rejected=[BAD])
    assert early.messages == [ASK] and [r["messages"] for r in early.responses] == [[GOOD, more, GOOD], [BAD]]
    asked = read(chosen=[ASK, GOOD, more, GOOD], rejected=[ASK, GOOD, other, BAD])  # users differ, too
    assert asked.messages == [ASK] and [len(r["messages"]) for r in asked.responses] == [3, 3]


def test_margin_has_two_names_and_subset_is_kept():
    assert read(prompt="q", chosen="a", rejected="b", margin=0.5).margin == 0.5
    assert read(prompt="q", answer_w="a", answer_l="b", precomputed_margin=1).margin == 1.0
    assert read(prompt="q", chosen="a", rejected="b", subset="hep-go").subset == "hep-go"


def test_system_message_beside_a_prompt_is_read():
    record = read(system="be kind", prompt="q", chosen="a", rejected="b")
    assert [message["role"] for message in record.messages] == ["system", "user"]


def test_of_two_responses_the_better_has_the_higher_score():
    ranked = read(prompt="q", candidates=["a", {"id": "x", "content": "b"}, [GOOD]], ranking=[2, 1, 3])
    assert responses(ranked) == [("0", "a", -2.0), ("x", "b", -1.0), ("2", "good", -3.0)]
    answers = [{"id": 1, "content": "a"}, {"id": 2, "content": "b"}]
    sampled = read(messages=[ASK], answers=answers, rewards={"1": 0.5, "2": 2.5})
    assert responses(sampled) == [("1", "a", 0.5), ("2", "b", 2.5)]
    assert [r["score"] for r in read(messages=[ASK], answers=answers).responses] == [None, None]


def test_judged_responses_have_three_forms():
    for raw in (
        {"messages": [ASK, GOOD], "label": 1},
        {"prompt": "q", "completion": "good", "label": True},
        {"context": [ASK], "answer": GOOD, "is_desirable": True},
    ):
        assert responses(read(**raw)) == [("0", "good", 1.0)]
    assert read(messages=[ASK, GOOD]).responses[0]["score"] is None


def test_steps_have_labels_of_their_own():
    for name in ("steps", "completions"):
        record = read(prompt="q", **{name: ["one", "two"]}, labels=[True, 0])
        assert record.steps == ["one", "two"] and record.step_labels == [1.0, 0.0] and record.responses == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, r"pairs.jsonl:3: field 'rejected' is missing \(found: 'prompt', 'chosen'\)"),
        ({"answer_l": "a"}, "field 'answer_w' is missing"),
        ({"chosen": "a", "rejected": "b"}, "field 'context' is missing"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "field 'prompt' is a number"),
        ({"context": [], "chosen": "a", "rejected": "b"}, "field 'context' is empty"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "field 'chosen' is a list|field 'chosen' is a number"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "field 'chosen' is empty"),
        ({"prompt": "q", "chosen": [ASK], "rejected": [ASK]}, "field 'chosen' ends with a message of the user"),
        ({"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "x"}, BAD]}, "does not begin with the messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "field 'margin' is nan"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "field 'margin' is a string"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": 1}, "field 'subset' is a number"),
        ({"prompt": "q", "chosen": {"role": "judge", "content": "a"}, "rejected": "b"}, "is 'judge'"),
        ({"prompt": "q", "candidates": []}, "field 'candidates' is empty"),
        ({"prompt": "q", "candidates": ["a"], "ranking": [1, 2]}, "field 'ranking' is not a list of 1 ranks"),
        ({"prompt": "q", "candidates": ["a"], "ranking": [None]}, r"field 'ranking\[0\]' is null"),
        ({"prompt": "q", "candidates": [{"id": 1, "content": "a"}] * 2}, "holds id '1' twice"),
        ({"messages": [ASK], "answers": [{"id": 1, "content": "a"}], "rewards": {}}, "field 'rewards.1' is missing"),
        ({"messages": [ASK], "answers": ["a"]}, r"field 'answers\[0\]' is a string"),
        ({"prompt": "q", "steps": ["a"], "labels": [0.5]}, r"field 'labels\[0\]' is 0.5"),
        ({"prompt": "q", "steps": ["a"], "labels": []}, "field 'labels' is not a list of 1 labels"),
        ({"prompt": "q", "steps": [1]}, r"field 'steps\[0\]' is a number"),
        ({"messages": [ASK]}, "hold no response to judge"),
        ({"messages": [GOOD], "label": 1}, "hold no response to judge"),
        ({"prompt": "q", "completion": "a", "label": 3}, "field 'label' is 3"),
        ({"prompt": "q", "completion": [ASK, BAD], "label": 1}, "field 'completion' begins with a message of the user"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "field 'margin' is a number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1e39}, "field 'margin' is 1e.39"),
        ({"prompt": "q", "candidates": [{"id": [], "content": "a"}]}, r"field 'candidates\[0\].id' is a list"),
        ({"messages": [ASK], "answers": [{"id": {}, "content": "a"}]}, r"field 'answers\[0\].id' is an object"),
        ({"id": [], "prompt": "q", "chosen": "a", "rejected": "b"}, "field 'id' is a list"),
    ],
)
def test_mistake_is_named_with_place_and_field(raw, message):
    with pytest.raises(RecordError, match=message):
        read(**raw)


def test_record_that_is_no_object_is_refused():
    with pytest.raises(RecordError, match="pairs.jsonl:3: the record is a list"):
        read_feedback([], "pairs.jsonl:3", 0)


def test_separator_that_a_template_would_change_is_refused(tokenizer):
    from lit_alignment.data.encoding.templates import TemplateConfig
    from lit_alignment.errors import ConfigError

    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    record = read(prompt="q", steps=["one", "two"])
    with pytest.raises(ConfigError, match="data.step_separator '.n.n': the template changes it"):
        response_encoder(tokenizer, TemplateConfig()).encode_steps(record, record.steps, "\n\n")
    ids, places = response_encoder(tokenizer, TemplateConfig()).encode_steps(record, record.steps, " ;")
    assert [tokenizer.decode(ids[: place + 1])[-5:] for place in places] == ["one ;", "two ;"]
