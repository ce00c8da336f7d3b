"""Rewards on right and wrong responses, with the references that records hold."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from lit_alignment.errors import ConfigError
from lit_alignment.generation.reward_scorer import RewardScorer
from lit_alignment.rollout import (
    ExactMatchReward,
    FormatReward,
    JsonEquality,
    LengthReward,
    ModelReward,
    RegexMatch,
)
from lit_alignment.rollout.rewards import prompt_messages
from tests.helpers import ROOT

ASKED = {"role": "user", "content": "What is 6 times 7?"}
RECORD = {"id": "r1", "messages": [ASKED, {"role": "assistant", "content": " 42\n"}], "label": "other"}
OPEN = {"id": "r2", "messages": [ASKED], "label": 42, "meta": {"answer": "Forty-Two", "all": [42]}}


def test_exact_match_compares_with_the_records_own_response():
    assert ExactMatchReward()(["42", "\t42 ", "42.", "", "other"], RECORD) == [1, 1, 0, 0, 0]


def test_exact_match_compares_with_the_label_where_there_is_no_response():
    assert ExactMatchReward()(["42", "42.0"], OPEN) == [1, 0]
    assert ExactMatchReward()(["true", "True"], {**OPEN, "label": True}) == [1, 0]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "six times seven", "label": "42"},
        {"prompt": [ASKED], "completion": "42"},
        {"instruction": "six times seven", "output": "42"},
        {"conversations": [{"from": "human", "value": "six times seven"}, {"from": "gpt", "value": "42"}]},
    ],
)
def test_references_and_prompts_are_found_in_every_form_of_chat(record):
    assert ExactMatchReward()(["42", "7"], record) == [1, 0]
    assert [message["role"] for message in prompt_messages(record)] == ["user"]


def test_exact_match_reads_a_field_and_folds_case_if_asked():
    assert ExactMatchReward(field="meta.answer")(["Forty-Two", "forty-two"], OPEN) == [1, 0]
    assert ExactMatchReward(field="meta.answer", ignore_case=True)(["forty-two", "forty two"], OPEN) == [1, 0]


def test_a_record_without_a_reference_is_an_error_unless_it_may_lack_one():
    record = {"messages": [ASKED]}
    with pytest.raises(ConfigError, match="no last message of the assistant and no label.*found: 'messages'"):
        ExactMatchReward()(["42"], record)
    with pytest.raises(ConfigError, match="the record has no 'meta.answer'"):
        ExactMatchReward(field="meta.answer")(["42"], record)
    for reward in (ExactMatchReward(optional=True), JsonEquality(optional=True), RegexMatch(pattern="(.*)", group=1)):
        reward.optional = True
        assert reward(["42", "43"], record) == [None, None]


def test_a_reference_that_is_no_text_is_refused_where_texts_are_compared():
    with pytest.raises(ConfigError, match="is a list, not a text. Set 'field', or use JsonEquality"):
        ExactMatchReward(field="meta.all")(["42"], OPEN)


def test_regex_searches_or_matches_the_whole_response():
    assert RegexMatch(pattern=r"\d+")(["it is 42", "none"], OPEN) == [1, 0]
    assert RegexMatch(pattern=r"\d+", full=True)(["it is 42", " 42\n"], OPEN) == [0, 1]
    assert RegexMatch(pattern="YES", ignore_case=True)(["yes", "no"], OPEN) == [1, 0]


def test_regex_compares_a_group_with_the_reference():
    reward = RegexMatch(pattern=r"answer: *(?P<number>\S+)?", group="number", field="label")
    assert reward(["so, answer: 42", "answer: 43", "42", "answer: "], OPEN) == [1, 0, 0, 0]
    assert RegexMatch(pattern=r"#### (.*)", group=1, field="meta.answer", ignore_case=True)(
        ["text\n#### forty-two \nmore", "#### two"], OPEN
    ) == [1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "(a"}, r"model.rewards.regex_match: pattern '\(a' is no regular expression"),
        ({"pattern": "a", "group": 1}, "the pattern has no group 1"),
        ({"pattern": "(a)", "group": "name"}, "the pattern has no group 'name'"),
        ({"pattern": "a", "field": "label"}, "have no effect without a group"),
        ({"pattern": "a", "timeout": 3.0}, "timeout has no effect, since it runs inline"),
        ({"pattern": "a", "weight": float("nan")}, "weight is nan; use a finite number"),
    ],
)
def test_regex_refuses_settings_without_use(settings, message):
    with pytest.raises(ConfigError, match=message):
        RegexMatch(**settings)


JSON = {"messages": [ASKED], "label": {"total": 42, "items": [1, {"a": None}], "paid": True}}


def test_json_is_compared_as_a_value():
    same = '{"paid": true, "items": [1.0, {"a": null}],\n "total": 4.2e1}'
    fenced = f" ```json\n{same}\n```\n"
    bare = f"```\n{same}\n```"
    wrong = [
        same.replace("true", "1"),  # equal in Python
        same.replace("null", "0"),
        same.replace("[1.0, ", "[").replace("}]", "}, 1]"),
        same[:-1],
        same.replace("4.2e1", "NaN"),
        same[:-1] + ', "total": 42}',  # twice
        f"Here it is:\n{fenced}",
        "",
    ]
    assert JsonEquality()([same, fenced, bare], JSON) == [1, 1, 1]
    assert JsonEquality()(wrong, JSON) == [0] * len(wrong)


def test_json_may_stand_in_a_text_of_the_record():
    record = {"messages": [ASKED, {"role": "assistant", "content": '{"a": [1, 2]}'}]}
    assert JsonEquality()(['{"a":[1,2]}', '{"a":[2,1]}', "[" * 100_000], record) == [1, 0, 0]
    with pytest.raises(ConfigError, match="what to compare with is not JSON"):
        JsonEquality()(["1"], {"messages": [ASKED], "label": "billing"})


def test_json_scores_the_share_of_fields():
    found = JsonEquality(per_field=True)(
        ['{"total": 42, "items": [], "paid": true}', '{"total": 42, "more": 1}', "{}", "[]", "no"], JSON
    )
    assert found == pytest.approx([2 / 3, 1 / 4, 0, 0, 0])
    assert JsonEquality(per_field=True)(["{}", "[]"], {**JSON, "label": {}}) == [1, 0]


def test_length_falls_in_a_straight_line_outside_its_range():
    reward = LengthReward(minimum=2, maximum=3, tolerance=4)
    texts = ["", "a", "a b", "a\n b  c", "a b c d", "a b c d e f", "a b c d e f g", "a b c d e f g h"]
    assert reward(texts, {}) == [0.5, 0.75, 1, 1, 0.75, 0.25, 0, 0]
    assert LengthReward(maximum=3, unit="characters")(["", "abc", "abcd"], {}) == [1, 1, 0]
    assert LengthReward(minimum=3, unit="characters", tolerance=2)(["abcdefgh", "ab", "a"], {}) == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "every length is in the range"),
        ({"minimum": 3, "maximum": 2}, "use 0 <= minimum <= maximum"),
        ({"maximum": 2, "tolerance": 0}, "tolerance of 1 or more"),
    ],
)
def test_length_refuses_ranges_without_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        LengthReward(**settings)


def test_format_asks_for_tags_in_order():
    right = ["<think>a\nb</think>\n<answer>4</answer>", " <think></think><answer></answer>\n"]
    wrong = [
        "<answer>4</answer><think>a</think>",
        "<think>a</think>",
        "<think>a</think> so <answer>4</answer>",
        "<think>a</think><answer>4</answer> done",
        "<think>a</think><answer>4</answer><answer>5</answer>",
        "<think>a<answer>4</answer></think>",
        "<think><think>a</think></think><answer>4</answer>",
        "",
    ]
    reward = FormatReward(tags=["think", "answer"])
    assert reward(right, {}) == [1, 1]
    assert reward(wrong, {}) == [0] * len(wrong)
    assert reward(["<think>" * 20_000], {}) == [0]


def test_format_asks_for_a_pattern():
    assert FormatReward(pattern=r"\w+\.")(["Yes.", " Yes.\n", "Yes. No.", "Yes"], {}) == [1, 1, 0, 0]


@pytest.mark.parametrize("settings", [{}, {"tags": []}, {"tags": ["a"], "pattern": "a"}])
def test_format_takes_one_form(settings):
    with pytest.raises(ConfigError, match="give either tags or a pattern"):
        FormatReward(**settings)


@pytest.mark.parametrize("tags", [["a", "a"], ["<a>"]])
def test_format_refuses_tags_that_are_no_names(tags):
    with pytest.raises(ConfigError, match="use different names"):
        FormatReward(tags=tags)


def test_model_reward_is_the_score_of_the_prompt_with_each_response(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    config = LlamaConfig.from_pretrained(ROOT / "configs/tiny", num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = ModelReward(path=str(tmp_path))
    with pytest.raises(TypeError, match="the model of model is not there yet"):
        reward(["42"], RECORD)
    reward.start(torch.device("cpu"))
    found = reward(["42", "please reply"], RECORD)  # not behind the record's own response
    expected = [[ASKED, {"role": "assistant", "content": text}] for text in ("42", "please reply")]
    assert found == pytest.approx(RewardScorer(str(tmp_path))(expected), abs=1e-6)
    assert found[0] != found[1]
