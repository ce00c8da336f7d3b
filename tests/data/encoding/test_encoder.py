import pytest

from lit_alignment.data.encoding.example import Dropped
from lit_alignment.data.encoding.messages import IGNORE_INDEX, read_record
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.errors import ConfigError, RecordError
from tests.helpers import encoder, record, response_encoder, table


def trained_text(tokenizer, example):
    return tokenizer.decode([label for label in example.labels if label != -100])


def test_golden_table_of_a_conversation(tokenizer):
    example = encoder(tokenizer).encode(record("Hi", "now", "more", "yes"))
    assert table(tokenizer, example) == (
        "<|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> as s istant \\n [n] [ow] [<|im_end|>] \\n "
        "<|im_start|> user \\n m o re <|im_end|> \\n <|im_start|> as s istant \\n [y] [es] [<|im_end|>] \\n"
    )


def test_loss_on(tokenizer):
    conversation = record("Hi", "now", "more", "yes")
    expected = {
        "assistant": "now<|im_end|>yes<|im_end|>",
        "last_assistant": "yes<|im_end|>",
        "all": "Hi<|im_end|>now<|im_end|>more<|im_end|>yes<|im_end|>",
    }
    for loss_on, text in expected.items():
        assert trained_text(tokenizer, encoder(tokenizer, loss_on=loss_on).encode(conversation)) == text


def test_end_of_turn_policy(tokenizer):
    conversation = record("Hi", "now", "more", "yes")
    expected = {"turn": "now<|im_end|>yes<|im_end|>", "last": "nowyes<|im_end|>", "none": "nowyes"}
    for policy, text in expected.items():
        assert trained_text(tokenizer, encoder(tokenizer, end_of_turn=policy).encode(conversation)) == text


def test_train_switch_and_weight_of_a_message(tokenizer):
    raw = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "now", "train": False},
            {"role": "user", "content": "more", "train": True},
            {"role": "assistant", "content": "yes", "weight": 0.5},
        ]
    }
    example = encoder(tokenizer).encode(read_record(raw, "f:1", 0))
    assert trained_text(tokenizer, example) == "more<|im_end|>yes<|im_end|>"
    assert sorted({w for w, l in zip(example.weights, example.labels, strict=True) if l != -100}) == [0.5, 1.0]


def test_pad_equal_to_eos_does_not_hide_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    example = encoder(tokenizer).encode(record("Hi", "now"))
    assert example.labels[-2] == tokenizer.eos_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("source", ["{{ bos_token }}", "{{ bos_token }}{{ bos_token }}", ""])
def test_at_most_one_bos_in_training_and_in_prompts(tokenizer, source):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = source + tokenizer.chat_template
    enc = encoder(tokenizer)
    for ids in (enc.encode(record("Hi", "now")).input_ids, enc.encode_prompt(record("Hi", "now")).input_ids):
        assert ids.count(tokenizer.bos_token_id) == (1 if source else 0)


def test_bos_of_the_prefix_form_stands_once(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    for prefix in ("{role}: ", "<s>{role}: "):
        enc = encoder(tokenizer, TemplateConfig(prefix=prefix, suffix="\n"))
        example = enc.encode(record("Hi", "now"))
        assert example.input_ids[0] == tokenizer.bos_token_id != example.input_ids[1]


class TestSystemPrompt:
    raw = {"messages": [{"role": "system", "content": "old"}, *record("Hi", "now").messages]}

    def test_source_prompt_replaces_the_record_s_own(self, tokenizer):
        example = encoder(tokenizer, loss_on="all").encode(read_record(self.raw, "f:1", 0), system_prompt="new")
        text = tokenizer.decode(example.input_ids)
        assert "new" in text and "old" not in text
        assert "new" not in trained_text(tokenizer, example)

    def test_ignore_system_prompt(self, tokenizer):
        example = encoder(tokenizer, ignore_system_prompt=True).encode(read_record(self.raw, "f:1", 0))
        assert "old" not in tokenizer.decode(example.input_ids)


class TestPrompts:
    def test_last_response_becomes_the_reference(self, tokenizer):
        prompt = encoder(tokenizer).encode_prompt(record("Hi", "now", "more", "yes"))
        assert prompt.reference == "yes" and len(prompt.messages) == 3
        assert tokenizer.decode(prompt.input_ids).endswith("more<|im_end|>\n<|im_start|>assistant\n")

    def test_open_conversation_has_no_reference(self, tokenizer):
        prompt = encoder(tokenizer).encode_prompt(record("Hi", "now", "more"))
        assert prompt.reference is None and len(prompt.messages) == 3

    def test_random_cut_is_seeded_by_the_record(self, tokenizer):
        records = [record("a", "b", "c", "d", "e", "f", id=str(i)) for i in range(40)]
        enc = encoder(tokenizer, random_cut=True)
        lengths = [len(enc.encode_prompt(r).messages) for r in records]
        assert set(lengths) == {1, 3, 5}
        assert lengths == [len(encoder(tokenizer, random_cut=True).encode_prompt(r).messages) for r in records]
        assert all(enc.encode_prompt(r).reference == "bdf"[n // 2] for r, n in zip(records, lengths, strict=True))

    def test_nothing_to_answer(self, tokenizer):
        raw = {"messages": [{"role": "system", "content": "s"}]}
        with pytest.raises(Dropped, match="nothing_to_answer"):
            encoder(tokenizer).encode_prompt(read_record(raw, "f:1", 0))


class TestTruncation:
    turns = tuple(f"{role}{i}" for i in range(1, 5) for role in "qa")
    conversation = record(*turns)

    def kept(self, tokenizer, max_length, **settings):
        example = encoder(tokenizer, max_length=max_length, **settings).encode(self.conversation)
        text = tokenizer.decode(example.input_ids)
        return [t for t in self.turns if t in text], example

    def test_exact_fit_is_kept(self, tokenizer):
        length = len(encoder(tokenizer).encode(self.conversation).input_ids)
        for policy in ("drop", "error", "keep_start", "keep_end", "middle"):
            assert self.kept(tokenizer, length, truncation=policy)[0] == list(self.turns)

    def test_whole_messages(self, tokenizer):
        length = len(encoder(tokenizer).encode(self.conversation).input_ids)
        expected = {
            "keep_start": ["q1", "a1", "q2", "a2", "q3", "a3"],
            "keep_end": ["q2", "a2", "q3", "a3", "q4", "a4"],
            "middle": ["q1", "a1", "q3", "a3", "q4", "a4"],
        }
        for policy, turns in expected.items():
            found, example = self.kept(tokenizer, length - 1, truncation=policy)
            assert found == turns and len(example.input_ids) <= length - 1

    def test_tokens(self, tokenizer):
        full = encoder(tokenizer).encode(self.conversation).input_ids
        for policy, expected in {
            "keep_start": full[:40],
            "keep_end": full[-40:],
            "middle": full[:20] + full[-20:],
        }.items():
            _, example = self.kept(tokenizer, 40, truncation=policy, truncation_unit="tokens")
            assert example.input_ids == expected

    @pytest.mark.parametrize("unit", ["messages", "tokens"])
    def test_system_message_stays(self, tokenizer, unit):
        raw = {"messages": [{"role": "system", "content": "rules"}, *self.conversation.messages]}
        for policy in ("keep_start", "keep_end", "middle"):
            enc = encoder(tokenizer, max_length=60, truncation=policy, truncation_unit=unit)
            example = enc.encode(read_record(raw, "f:1", 0))
            assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\nrules<|im_end|>")
            assert len(example.input_ids) <= 60

    def test_too_long_is_dropped_or_an_error(self, tokenizer):
        with pytest.raises(Dropped, match="too_long"):
            self.kept(tokenizer, 50, truncation="drop")
        with pytest.raises(RecordError, match=r"test.jsonl:1: the conversation has \d+ tokens, more than max_length"):
            self.kept(tokenizer, 50, truncation="error")
        with pytest.raises(Dropped, match="too_long"):  # not even one exchange fits
            self.kept(tokenizer, 8, truncation="keep_end")

    def test_prompt_keeps_its_question(self, tokenizer):
        enc = encoder(tokenizer, max_length=40, truncation="keep_end")
        prompt = enc.encode_prompt(self.conversation)
        assert len(prompt.input_ids) <= 40 and prompt.messages[-1]["content"] == "q4"
        assert prompt.messages[0]["role"] == "user"


def test_no_trained_token_is_refused_with_its_reason(tokenizer):
    with pytest.raises(Dropped, match="no_trained_message"):
        encoder(tokenizer).encode(record("only a question"))
    with pytest.raises(Dropped, match="no_trained_token"):
        encoder(tokenizer, end_of_turn="none").encode(record("Hi", ""))
    cut = encoder(tokenizer, max_length=6, truncation="keep_start", truncation_unit="tokens")
    with pytest.raises(Dropped, match="no_trained_token"):
        cut.encode(record("a long question that fills it", "now"))


def test_useless_max_length_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="max_length is 1"):
        encoder(tokenizer, max_length=1)


CONTEXT = ("first question here", "first answer", "second question", "second answer", "third question")
CHOSEN = {"role": "assistant", "content": "yes please reply"}
REJECTED = {"role": "assistant", "content": "no"}


def common_start(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_both_responses_of_a_pair_follow_the_same_prompt_ids(tokenizer):
    chosen, rejected = response_encoder(tokenizer).encode_responses(record(*CONTEXT), [[CHOSEN], [REJECTED]])
    prompt = encoder(tokenizer).encode_prompt(record(*CONTEXT)).input_ids
    assert chosen.input_ids[: len(prompt)] == rejected.input_ids[: len(prompt)] == prompt
    for example, text in ((chosen, "yes please reply"), (rejected, "no")):
        trained = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE_INDEX]
        assert tokenizer.decode(trained) == f"{text}<|im_end|>"
        assert all(label == IGNORE_INDEX for label in example.labels[: len(prompt)])


@pytest.mark.parametrize("swap", [False, True])
def test_prompt_of_a_pair_is_shortened_once_for_both(tokenizer, swap):
    whole = response_encoder(tokenizer).encode_responses(record(*CONTEXT), [[CHOSEN], [REJECTED]])
    limit = len(whole[0].input_ids) - 1  # the longer one does not fit, the shorter one would
    assert len(whole[1].input_ids) <= limit
    responses = (REJECTED, CHOSEN) if swap else (CHOSEN, REJECTED)
    pair = response_encoder(tokenizer, max_length=limit).encode_responses(
        record(*CONTEXT), [[response] for response in responses]
    )
    prompt = encoder(tokenizer).encode_prompt(record(*CONTEXT[2:])).input_ids
    assert all(example.input_ids[: len(prompt)] == prompt for example in pair)
    assert common_start(pair[0].input_ids, pair[1].input_ids) == len(prompt)
    assert max(len(example.input_ids) for example in pair) <= limit


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_pair_with_an_empty_response_is_refused(tokenizer, empty):
    blank = {"role": "assistant", "content": empty}
    for pair in ((CHOSEN, blank), (blank, REJECTED)):
        with pytest.raises(Dropped) as drop:
            response_encoder(tokenizer).encode_responses(record(*CONTEXT), [[response] for response in pair])
        assert drop.value.reason == "empty_response"


@pytest.mark.parametrize("policy", ["drop", "keep_end", "keep_start"])
def test_pair_that_cannot_fit_is_dropped_with_its_reason(tokenizer, policy):
    with pytest.raises(Dropped) as drop:
        response_encoder(tokenizer, max_length=9, truncation=policy).encode_responses(
            record(*CONTEXT), [[CHOSEN], [REJECTED]]
        )
    assert drop.value.reason == "too_long"
