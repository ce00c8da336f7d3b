"""Spans under the templates that well-known models carry, with golden tables of tokens; trained ones in [brackets]."""

import re

import pytest

from lit_alignment.data.encoding.example import Dropped
from lit_alignment.data.encoding.messages import read_record
from lit_alignment.data.encoding.templates import TemplateConfig, build_template
from lit_alignment.errors import ConfigError
from tests.helpers import ROOT, encoder, record, table

FOLDER = ROOT / "tests/data/encoding/templates"
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "<bos>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
ALL = ["llama3", "llama2", "qwen3", "gemma", "plain"]


@pytest.fixture
def rich_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def file(name: str, **rest) -> TemplateConfig:
    return TemplateConfig(file=str(FOLDER / f"{name}.jinja"), **rest)


GOLDEN = {
    "llama3": (
        "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> \\n \\n Hi <|eot_id|> <|start_header_id|>"
        " as s istant <|end_header_id|> \\n \\n [n] [ow] [<|eot_id|>] <|start_header_id|> user "
        "<|end_header_id|> \\n \\n m o re <|eot_id|> <|start_header_id|> as s istant <|end_header_id|> \\n \\n "
        "[y] [es] [<|eot_id|>]"
    ),
    "gemma": (
        "<bos> <start_of_turn> user \\n Hi <end_of_turn> \\n <start_of_turn> m odel \\n [n] [ow] [<end_of_turn>]"
        " \\n <start_of_turn> user \\n m o re <end_of_turn> \\n <start_of_turn> m odel \\n [y] [es] "
        "[<end_of_turn>] \\n"
    ),
    "qwen3": (
        "<|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> as s istant \\n [n] [ow] [<|im_end|>] \\n "
        "<|im_start|> user \\n m o re <|im_end|> \\n <|im_start|> as s istant \\n < t hin k > \\n \\n < / t hin k "
        "> \\n \\n [y] [es] [<|im_end|>] \\n"
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_table(name, rich_tokenizer):
    example = encoder(rich_tokenizer, file(name)).encode(record("Hi", "now", "more", "yes"))
    assert table(rich_tokenizer, example) == GOLDEN[name]


@pytest.mark.parametrize("bos", ["", "<s>"])
@pytest.mark.parametrize("prompt", [True, False])
def test_prefix_and_suffix_as_jinja_give_the_same_text(rich_tokenizer, bos, prompt):
    """What an export carries, so that a server renders as training did."""
    rich_tokenizer.bos_token = bos or None
    config = TemplateConfig(
        prefix="\U0001f600<|im_start|>{role}\n'\"", suffix=" \\n}}<|im_end|>\n", role_names={"bot": "m\u00f6del"}
    )
    template = build_template(config, rich_tokenizer)
    messages = [{"role": role, "content": f"{role} says {{{{ x }}}}\n"} for role in ("system", "user", "assistant")]
    text = rich_tokenizer.apply_chat_template(
        messages, chat_template=template.as_jinja(), add_generation_prompt=prompt, tokenize=False
    )
    assert text == template.render(messages, [], prompt) and text.startswith(bos)


@pytest.mark.parametrize("name", ALL)
def test_trained_text_is_the_responses_and_their_end_of_turn(name, rich_tokenizer):
    """The last trained token of a turn is its end-of-turn token, once; nothing of the headers is trained."""
    closing = {
        "llama3": "<|eot_id|>",
        "llama2": " </s>",
        "qwen3": "<|im_end|>",
        "gemma": "<end_of_turn>",
        "plain": "\n\n",
    }
    opening = " " if name == "llama2" else ""
    example = encoder(rich_tokenizer, file(name)).encode(record("Where is it?", "On its way.", "When?", "Today."))
    trained = rich_tokenizer.decode([i for i, l in zip(example.input_ids, example.labels, strict=True) if l != -100])
    assert trained == "".join(opening + text + closing[name] for text in ("On its way.", "Today."))
    assert rich_tokenizer.decode(example.end_of_turn) == closing[name]


@pytest.mark.parametrize("name", ALL)
def test_prompt_ids_are_a_prefix_of_the_training_ids(name, rich_tokenizer):
    """Predict and training see the same ids, at each response of the conversation."""
    enc = encoder(rich_tokenizer, file(name))
    turns = ["Where is my \n order?", "\n\nOn its way.", "  When? ", "Today. ", "Thanks", " ok\n"]
    for stop in (2, 4, 6):
        example = enc.encode(record(*turns[:stop]))
        prompt = enc.encode_prompt(record(*turns[:stop]))
        assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        first_trained = next(i for i in range(len(prompt.input_ids), len(example.labels)) if example.labels[i] != -100)
        skipped = rich_tokenizer.decode(example.input_ids[len(prompt.input_ids) : first_trained])
        assert skipped.strip() in ("", "<think>\n\n</think>")


def test_empty_think_block_is_trained_only_when_asked(rich_tokenizer):
    conversation = record("Hi", "now")
    for asked in (False, True):
        example = encoder(rich_tokenizer, file("qwen3", train_empty_thinking=asked)).encode(conversation)
        trained = [i for i, l in zip(example.input_ids, example.labels, strict=True) if l != -100]
        assert ("<think>" in rich_tokenizer.decode(trained)) is asked


def test_think_block_with_content_is_trained(rich_tokenizer):
    example = encoder(rich_tokenizer, file("qwen3")).encode(record("Hi", "<think>\nhm\n</think>\n\nnow"))
    trained = rich_tokenizer.decode([l for l in example.labels if l != -100])
    assert trained == "<think>\nhm\n</think>\n\nnow<|im_end|>"


def test_think_block_in_the_generation_prompt_is_part_of_the_prompt(rich_tokenizer):
    enc = encoder(rich_tokenizer, file("qwen3", variables={"enable_thinking": False}))
    example, prompt = enc.encode(record("Hi", "now")), enc.encode_prompt(record("Hi", "now"))
    assert rich_tokenizer.decode(prompt.input_ids).endswith("</think>\n\n")
    assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_tool_call_is_trained_with_its_end_of_turn(rich_tokenizer):
    call = {"function": {"name": "look", "arguments": {"order": "A1"}}}
    raw = {
        "messages": [
            {"role": "user", "content": "where?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "here"},
            {"role": "assistant", "content": "Here."},
        ]
    }
    example = encoder(rich_tokenizer, file("qwen3")).encode(read_record(raw, "f:1", 0))
    trained = rich_tokenizer.decode([l for l in example.labels if l != -100])
    assert trained.count("<|im_end|>") == 2 and '"order": "A1"' in trained and "here" not in trained
    assert trained.startswith("\n<tool_call>") and trained.endswith("Here.<|im_end|>")


def test_template_without_generation_tags_still_gets_its_labels(tokenizer):
    """transformers' own assistant mask of this template is all zeros."""
    conversation = record("Hi", "now")
    mask = tokenizer.apply_chat_template(
        conversation.messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )["assistant_masks"]
    assert sum(mask) == 0
    assert encoder(tokenizer).encode(conversation).num_trained == 3


def test_refused_conversation_is_dropped_with_its_reason(rich_tokenizer):
    raw = {"messages": [{"role": "system", "content": "s"}, *record("Hi", "now").messages]}
    with pytest.raises(Dropped) as drop:
        encoder(rich_tokenizer, file("gemma")).encode(read_record(raw, "f.jsonl:4", 0))
    assert drop.value.reason == "template_error"
    assert "f.jsonl:4" in drop.value.detail and "System role not supported" in drop.value.detail


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth exceeded"),
        ("{{ 2.0 ** 100000 }}", "Numerical result out of range"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages[0].nothing.at.all }}", "has no attribute 'nothing'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 1001 }}", "more than 1000 characters; encoding.template.max_characters"),
        ("{% for i in range(2000) %}{{ 1 }}{% endfor %}", "more than 1000 characters"),
        ("{% set a %}{% for i in range(2000) %}{{ 1 }}{% endfor %}{% endset %}", "more than 1000 characters"),
        ("{% for i in range(90000) %}{% for j in range(90000) %}more{% endfor %}{% endfor %}", "more than 1000"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{{ raise_exception('no') }}", r"refuses this conversation \(no\)"),
    ],
)
def test_errors_inside_a_template_drop_the_records_that_meet_them(tokenizer, tmp_path, code, words):
    path = tmp_path / "own.jinja"
    path.write_text("{% if 'now' in messages[0].content %}" + code + "{% endif %}" + TURNS)
    made = encoder(tokenizer, TemplateConfig(file=str(path), max_characters=1000))
    assert made.encode(record("Hi", "there")).num_trained > 0
    with pytest.raises(Dropped) as drop:
        made.encode(record("now", "there"))
    assert drop.value.reason == "template_error"
    assert drop.value.detail.startswith("test.jsonl:1: ") and str(path) in drop.value.detail
    assert re.search(words, drop.value.detail)


def test_limit_of_what_a_template_writes_is_a_setting(tokenizer):
    text = "the kitchen " * 100
    for most in (1000, 2000):
        made = encoder(tokenizer, TemplateConfig(max_characters=most))
        if most == 2000:
            assert made.encode(record(text, "order")).num_trained > 0
        else:
            with pytest.raises(Dropped, match="template_error"):
                made.encode(record(text, "order"))
    with pytest.raises(ConfigError, match="max_characters is 0"):
        TemplateConfig(max_characters=0)


def test_template_that_is_no_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="own.jinja: cannot be read"):
        encoder(tokenizer, TemplateConfig(file=str(tmp_path / "own.jinja")))


class TestPrefixSuffix:
    config = TemplateConfig(
        prefix="<RS>{role}: ", suffix="</RS>", role_names={"bot": "AI", "user": "Human"}, append_eos=True
    )

    def test_content_suffix_and_eos_are_trained(self, tokenizer):
        example = encoder(tokenizer, self.config).encode(record("Hi", "now"))
        trained = tokenizer.decode([i for i, l in zip(example.input_ids, example.labels, strict=True) if l != -100])
        assert trained == "now</RS><|im_end|>"
        assert tokenizer.decode(example.input_ids) == "<|im_start|><RS>Human: Hi</RS><RS>AI: now</RS><|im_end|>"

    def test_without_eos_the_suffix_closes_the_turn(self, tokenizer):
        config = TemplateConfig(prefix="<RS>{role}: ", suffix="</RS>", append_eos=False)
        example = encoder(tokenizer, config).encode(record("Hi", "now", "x", "yes"))
        trained = tokenizer.decode([i for i, l in zip(example.input_ids, example.labels, strict=True) if l != -100])
        assert trained == "now</RS>yes</RS>"

    def test_first_user_turn_stays_whatever_the_prefix_starts_with(self, tokenizer):
        """A well-known fault cuts all before the first token that looks like the assistant's prefix."""
        config = TemplateConfig(prefix="{role}\n", suffix="\n", role_names={"bot": "assistant"})
        example = encoder(tokenizer, config).encode(record("the assistant is late", "now"))
        assert "user\nthe assistant is late\n" in tokenizer.decode(example.input_ids)

    def test_prompt_is_a_prefix_of_training(self, tokenizer):
        enc = encoder(tokenizer, self.config)
        example, prompt = enc.encode(record("Hi ", " now")), enc.encode_prompt(record("Hi ", " now"))
        assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids

    def test_wrong_settings_are_refused(self, tokenizer):
        with pytest.raises(ConfigError, match="together"):
            TemplateConfig(prefix="x")
        with pytest.raises(ConfigError, match="not both"):
            TemplateConfig(file="x", prefix="x", suffix="y")
        with pytest.raises(ConfigError, match="only {role} may stand in braces"):
            encoder(tokenizer, TemplateConfig(prefix="{name}", suffix="x"))


def test_missing_template_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="no such template file"):
        encoder(tokenizer, TemplateConfig(file="nowhere.jinja"))
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        encoder(tokenizer)
