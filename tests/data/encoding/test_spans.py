"""What is trained under templates that move text, open think blocks, write calls or end turns in ways of their own."""

import re
from dataclasses import replace

import pytest

from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.example import HISTORY_DIFFERS, Dropped
from lit_alignment.data.encoding.messages import Record, read_record
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.multimodal.media import MediaTokens
from lit_alignment.data.passages import Passage
from lit_alignment.data.rag import PassagePlacementConfig, RAGEncoder
from lit_alignment.data.vlm import VLMEncoder
from lit_alignment.errors import RecordError
from lit_alignment.models.stop_rule import stop_rule
from tests.helpers import ROOT, encoder, record, response_encoder

FOLDER = ROOT / "tests/data/encoding/templates"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "ARG1"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASKED = [{"role": "user", "content": "USR1 asks."}, {"role": "assistant", "content": "ANS1 is it."}]
MORE = [{"role": "user", "content": "USR2 more?"}, {"role": "assistant", "content": "ANS2 yes."}]
CALLED = [
    {"role": "user", "content": "USR1 asks."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "TOL1", "name": "weather"},
    {"role": "assistant", "content": "ANS2 is it."},
]
THANKS = [{"role": "user", "content": "USR3 thanks."}, {"role": "assistant", "content": "ANS3 bye."}]
THOUGHT = [
    CALLED[0],
    {**CALLED[1], "content": "", "reasoning_content": "THK1 hm"},
    CALLED[2],
    {**CALLED[3], "reasoning_content": "THK2 hm"},
]
SECOND = {"type": "function", "function": {"name": "weather", "arguments": {"city": "ARG2"}}}
TWICE = [
    CALLED[0],
    {**CALLED[1], "tool_calls": [CALL, SECOND]},
    CALLED[2],
    {**CALLED[2], "content": "TOL2"},
    CALLED[3],
]
SYSTEM = [{"role": "system", "content": "SYS1 be brief."}]
CHATS = {
    "one turn": ASKED,
    "two turns": [*ASKED, *MORE],
    "system": [*SYSTEM, *ASKED],
    "system, two turns": [*SYSTEM, *ASKED, *MORE],
}
CALLS = {
    "call": CALLED[:2],
    "call and answer": CALLED,
    "call, answer, turn": [*CALLED, *THANKS],
    "two calls": TWICE,
    "reasoning": THOUGHT,
    "reasoning, turn": [*THOUGHT, *THANKS],
}
# What stops a turn under each template; behind a call, what stops that.
STOPS = {
    "system_in_last_user": ("<|im_end|>", "<|im_end|>"),
    "think_in_prompt": ("<|eos|>", "<|eos|>"),
    "end_with_next": ("<|/bot|>", "<|/tools|>"),
    "end_is_header": ("<|user|>", "<|observation|>"),
    "two_ends": ("<|END_OF_TURN|>", "<|END_OF_TURN|>"),
    "reasoning": ("<|im_end|>", "<|im_end|>"),
}
WORD = re.compile(r"[A-Z]{3}[0-9]")
CONTROL = re.compile(r"<\|[\w/]+\|>|</?think>|\[/?INST\]|\[gMASK\]|<sop>|\[/?[A-Z_]{6,}\]")


@pytest.fixture
def rich(tokenizer):
    """A tokenizer that has the control tokens of all these templates."""
    sources = [file.read_text(encoding="utf-8") for file in FOLDER.glob("*.jinja")]
    control = sorted({each for source in sources for each in CONTROL.findall(source)} - {"<|role|>"})
    tokenizer.add_tokens([*control, "<|role|>", "<|system|>", "<|user|>"], special_tokens=True)
    return tokenizer


def under(rich, name, variables=None, **settings):
    config = TemplateConfig(file=str(FOLDER / f"{name}.jinja"), variables=variables or {})
    return encoder(rich, config, max_length=10_000, **settings)


def conversation(messages, **rest):
    return read_record({"id": "a", "messages": messages, **rest}, "f:1", 0)


def examples(enc, wanted):
    """The examples that a data module makes of a record."""
    try:
        return [enc.encode(wanted)]
    except Dropped as drop:
        assert drop.reason == HISTORY_DIFFERS
        return [enc.encode(part) for part in enc.split_turns(wanted)]


def runs(tokenizer, example):
    """The trained texts of an example, one for each stretch of labels."""
    found, last = [], -2
    for position, label in enumerate(example.labels):
        if label == -100:
            continue
        if position != last + 1:
            found.append([])
        found[-1].append(label)
        last = position
    return [tokenizer.decode(each) for each in found]


@pytest.mark.parametrize("chat", [*CHATS, *CALLS])
@pytest.mark.parametrize("name", STOPS)
def test_exactly_the_whole_response_and_its_stop_are_trained(name, chat, rich):
    """Judged by words of their own in all messages."""
    enc = under(rich, name)
    wanted = conversation((CHATS | CALLS)[chat], **({"tools": [TOOL]} if chat in CALLS else {}))
    found = examples(enc, wanted)
    trained = [text for example in found for text in runs(rich, example)]
    words = [word for text in trained for word in WORD.findall(text)]
    whole = "".join(rich.decode(example.input_ids) for example in found)
    responses = [message for message in wanted.messages if message["role"] == "assistant"]
    assert not [word for word in words if word[:3] in ("USR", "SYS", "TOL")]
    for message in responses:
        expected = [call["function"]["arguments"]["city"] for call in message.get("tool_calls", [])]
        expected += WORD.findall(message["content"] or "")
        expected += [w for w in WORD.findall(message.get("reasoning_content", "")) if w in whole]
        assert all(words.count(word) == 1 for word in expected), (expected, trained)
    assert all(word in whole for message in wanted.messages for word in WORD.findall(message["content"] or ""))
    stop, call_stop = STOPS[name]
    endings = [call_stop if "tool_calls" in message else stop for message in responses]
    assert len(trained) == len(endings), trained
    assert all(text.endswith(ending) for text, ending in zip(trained, endings, strict=True)), trained


def test_call_that_is_left_out_beside_another_is_noticed(rich, tmp_path):
    """The template writes the first call of a message alone, and its name again beside each result (gpt-oss)."""
    path = tmp_path / "first_call.jinja"
    path.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
        "{% elif m.role == 'tool' %}{{ messages[1].tool_calls[0].function.name }}: {{ m.content }}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    enc = encoder(rich, TemplateConfig(file=str(path)))
    assert WORD.findall("".join(runs(rich, enc.encode(conversation(CALLED))))) == ["ARG1", "ANS2"]
    with pytest.raises(Dropped) as drop:
        enc.encode(conversation(TWICE))
    assert "leaves out a tool call of message 1" in drop.value.detail


def test_marks_are_found_where_a_template_escapes_them(rich, tmp_path):
    path = tmp_path / "escapes.jinja"
    path.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | tojson(ensure_ascii=true) }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    enc = encoder(rich, TemplateConfig(file=str(path)))
    assert runs(rich, enc.encode(conversation(ASKED))) == ['"ANS1 is it."</s>']


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
FOOT = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS_OF = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
LETTERS = "{{ m.content or '' }}"
STOPPING = {"function": {"name": "f", "arguments": {"x": "a<|im_end|>b"}}}
# By what a template does: its text, the conversation, and what is to be trained.
HABITS = {
    "an answer begins like the think block of the prompt": (
        HEAD + "{{ m.content }}" + FOOT.replace("assistant\n{%", "assistant\n<think>\n{%"),
        [ASKED[0], {"role": "assistant", "content": "<b>ANS1"}],
        ["<b>ANS1<|im_end|>"],
    ),
    "the last question has a word more": (
        HEAD + "{{ m.content }}{% if loop.last and m.role == 'user' %} /no_think{% endif %}" + FOOT,
        [*ASKED, *MORE],
        ["ANS1 is it.<|im_end|>", "ANS2 yes.<|im_end|>"],
    ),
    "the prompt has a system message of its own": (
        HEAD + "{{ m.content }}" + FOOT.replace("<|im_start|>a", "<|im_start|>system\nx<|im_end|>\n<|im_start|>a"),
        ASKED,
        ["ANS1 is it.<|im_end|>"],
    ),
    "a result stands between a call and its text": (
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n"
        + CALLS_OF
        + "{% if m.tool_calls and loop.nextitem %}[{{ loop.nextitem.content }}]{% endif %}"
        + LETTERS
        + "<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        [ASKED[0], {**CALLED[1], "content": "ANS1 look."}, *CALLED[2:]],
        ['{"name": "weather", "arguments": {"city": "ARG1"}}ANS1 look.<|im_end|>', "ANS2 is it.<|im_end|>"],
    ),
    "the last call ends otherwise": (
        "{% for m in messages %}<|{{ m.role }}|>" + LETTERS + CALLS_OF + "{% if m.tool_calls %}]{% endif %}"
        "{% if not loop.last %}<|eos|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|eos|><|assistant|>{% endif %}",
        CALLED[:2],
        ['{"name": "weather", "arguments": {"city": "ARG1"}}]<|eos|>'],
    ),
    "plain text stands between closing tokens": (
        "{% for m in messages %}<|sys|>{{ m.role }}<|dev|>{{ m.content }}<|/sys|>{{ m.role }}<|/dev|>{% endfor %}"
        "{% if add_generation_prompt %}<|sys|>assistant<|dev|>{% endif %}",
        [*ASKED, *MORE],
        ["ANS1 is it.<|/sys|>assistant<|/dev|>", "ANS2 yes.<|/sys|>assistant<|/dev|>"],
    ),
    "each text ends with a prompt": (
        "<|bot|>x<|im_end|>{% for m in messages %}<|bot|>{% if m.role == 'user' %}<|usr|>{{ m.content }}<|im_end|>"
        "{% else %}<|out|>{{ m.content }}<|/bot|><|im_end|>{% endif %}{% endfor %}<|bot|><|out|>",
        [*ASKED, *MORE],
        ["ANS1 is it.<|/bot|><|im_end|>", "ANS2 yes.<|/bot|><|im_end|>"],
    ),
    "a call is written by what its name is": (
        HEAD + LETTERS + "{% for c in m.tool_calls or [] %}{% if c.function.name == 'weather' %}<|sys|>"
        "{{ c.function.arguments.city }}<|/sys|>{% else %}{{ raise_exception('unknown') }}{% endif %}{% endfor %}"
        + FOOT,
        CALLED,
        ["<|sys|>ARG1<|/sys|><|im_end|>", "ANS2 is it.<|im_end|>"],
    ),
    "a text that is null is read once the conversation goes on": (
        HEAD + "{{ (m.content or '') if loop.last else m.content.split('</think>')[-1] }}" + CALLS_OF + FOOT,
        CALLED,
        ['{"name": "weather", "arguments": {"city": "ARG1"}}<|im_end|>', "ANS2 is it.<|im_end|>"],
    ),
    "an argument holds the text of a stop": (
        HEAD + LETTERS + CALLS_OF + FOOT,
        [
            ASKED[0],
            {**CALLED[1], "tool_calls": [{"function": {"name": "f", "arguments": {"x": "a<|im_end|>b"}}}]},
            *THANKS,
        ],
        ['{"name": "f", "arguments": {"x": "a<|im_end|>b"}}<|im_end|>', "ANS3 bye.<|im_end|>"],
    ),
    "a plain end stands behind white space of the text": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        [ASKED[0], {"role": "assistant", "content": "ANS1 \n"}, *MORE],
        ["ANS1 \n</turn>\n", "ANS2 yes.</turn>\n"],
    ),
    "a line end stands before the header that ends a turn": (
        "{% for m in messages %}{{ '\n<|usr|>' + m.role + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|usr|>assistant\n' }}{% endif %}",
        [*ASKED, *MORE],
        ["ANS1 is it.\n<|usr|>", "ANS2 yes.\n<|usr|>"],
    ),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_templates(habit, rich, tmp_path):
    source, messages, expected = HABITS[habit]
    path = tmp_path / "habit.jinja"
    path.write_text(source)
    enc = encoder(rich, TemplateConfig(file=str(path)), max_length=10_000)
    found = examples(enc, conversation(messages))
    assert [text for each in found for text in runs(rich, each)] == expected
    prompt, ids = enc.encode_prompt(conversation(messages)).input_ids, found[-1].input_ids
    shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    assert rich.decode(prompt[shared:]) in ("", "<think>\n")


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("asked", [{"role": "user", "content": ""}, {**CALLED[2], "content": ""}])
def test_answers_to_empty_texts_are_trained(asked, name, rich):
    before = CALLED[:2] if asked["role"] == "tool" else []
    answer = {"role": "assistant", "content": "ANS5 so."}
    wanted = conversation([*before, asked, answer], **({"tools": [TOOL]} if before else {}))
    trained = examples(under(rich, name), wanted)[-1]
    assert WORD.findall(runs(rich, trained)[-1]) == ["ANS5"] and runs(rich, trained)[-1].endswith(STOPS[name][0])


@pytest.mark.parametrize("name", ["reasoning", "two_ends", "think_in_prompt", "end_is_header"])
def test_two_responses_in_a_row_are_trained(name, rich):
    wanted = conversation([*ASKED, {"role": "assistant", "content": "ANS2 more."}])
    trained = "".join(text for example in examples(under(rich, name), wanted) for text in runs(rich, example))
    assert WORD.findall(trained) == ["ANS1", "ANS2"] and "USR1" not in trained


@pytest.mark.parametrize("name", STOPS)
def test_stop_rule_is_what_was_trained(name, rich):
    enc = under(rich, name)
    stops = stop_rule(rich, enc.end_of_turn(), enc.end_of_call())
    expected = {rich.eos_token, *STOPS[name]}
    assert set(rich.convert_ids_to_tokens(stops.token_ids)) == expected and not stops.strings


@pytest.mark.parametrize("chat", [*CHATS, *CALLS])
@pytest.mark.parametrize("name", STOPS)
def test_prompt_ids_are_a_prefix_but_for_a_block_in_the_prompt_alone(name, chat, rich):
    enc = under(rich, name)
    wanted = conversation((CHATS | CALLS)[chat], **({"tools": [TOOL]} if chat in CALLS else {}))
    ids, prompt = examples(enc, wanted)[-1].input_ids, enc.encode_prompt(wanted).input_ids
    shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    assert rich.decode(prompt[shared:]) in (("", "<think>\n") if name == "think_in_prompt" else ("",))
    text = enc.template.render(wanted.messages[:-1], wanted.tools, prompt=True)
    assert rich.decode(prompt) == text


def test_system_text_stands_where_the_model_would_see_it(rich):
    """The template drops it as soon as an answer follows the last question."""
    enc = under(rich, "system_in_last_user")
    found = examples(enc, conversation(CHATS["system, two turns"]))
    assert [rich.decode(each.input_ids) for each in found] == [
        "<|im_start|>[INST] SYS1 be brief.\n\nUSR1 asks.[/INST] ANS1 is it.<|im_end|>",
        "<|im_start|>[INST] USR1 asks.[/INST] ANS1 is it.<|im_end|>"
        "[INST] SYS1 be brief.\n\nUSR2 more?[/INST] ANS2 yes.<|im_end|>",
    ]
    assert [part.id for part in enc.split_turns(conversation(CHATS["system, two turns"]))] == ["a#1", "a#2"]
    assert not under(rich, "system_in_last_user", split_turns="never").split_turns(conversation(CHATS["two turns"]))


@pytest.mark.parametrize("name", ["end_with_next", "end_is_header"])
def test_stop_that_is_written_with_the_next_message_is_added_on_request(name, rich):
    stop = STOPS[name][0]
    with_stop, without = under(rich, name), under(rich, name, add_stop=False)
    example = with_stop.encode(conversation(ASKED))
    assert example.labels[-1] == rich.convert_tokens_to_ids(stop) and example.notes["end of turn added"] == 1
    assert without.encode(conversation(ASKED)).input_ids == example.input_ids[:-1]
    assert without.encode(conversation(ASKED)).notes["turns without an end"] == 1
    assert with_stop.end_of_turn() == [rich.convert_tokens_to_ids(stop)]
    # In the middle of a conversation the template has written it.
    assert (
        without.encode(conversation([*ASKED, *MORE])).input_ids
        == with_stop.encode(conversation([*ASKED, *MORE])).input_ids[:-1]
    )


def test_next_header_that_is_no_stop_is_not_trained(rich):
    """EOS stands behind the last response alone; the turns before have no end to be trained."""
    example = under(rich, "eos_after_last").encode(conversation([*ASKED, *MORE]))
    assert runs(rich, example) == ["ANS1 is it.", "ANS2 yes.<|im_end|>"]
    assert example.notes["turns without an end"] == 1


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", STOPS)
def test_other_methods_read_the_same_conversations(name, chat, rich):
    """Responses to be scored stand behind their prompt; a classifier reads whole conversations."""
    wanted = conversation(CHATS[chat])
    settings = TemplateConfig(file=str(FOLDER / f"{name}.jinja"))
    scoring = response_encoder(rich, settings, max_length=10_000)
    asked = replace(wanted, messages=wanted.messages[:-1])
    answers = [wanted.messages[-1], {"role": "assistant", "content": "ANS9 no."}]
    found = scoring.encode_responses(asked, [[answer] for answer in answers])
    assert [WORD.findall("".join(runs(rich, each))) for each in found] == [WORD.findall(a["content"]) for a in answers]
    prompt = "".join(word for word in WORD.findall(scoring.template.render(asked.messages, [], prompt=True)))
    for example in found:
        assert "".join(WORD.findall(rich.decode(example.input_ids))).startswith(prompt)
    read = under(rich, name).encode_conversation(wanted).input_ids
    whole = rich.decode(read)
    assert scoring.template.render(wanted.messages, [], prompt=False) in (whole, whole.removesuffix(STOPS[name][0]))


@pytest.mark.parametrize("name", STOPS)
def test_passages_and_images_stand_in_the_same_conversations(name, rich):
    settings = EncodingConfig(template=TemplateConfig(file=str(FOLDER / f"{name}.jinja")), max_length=10_000)
    rag = RAGEncoder(rich, settings)
    rag.placement = PassagePlacementConfig()
    asked, answer = rag.split(conversation(CHATS["system, two turns"]))
    example = rag.example(asked, answer, [Passage("p", "PSG1", "PSG2 knows.")])
    assert WORD.findall("".join(runs(rich, example))) == ["ANS2"]
    assert {"SYS1", "PSG2", "USR2"} <= set(WORD.findall(rich.decode(example.input_ids)))
    rich.add_tokens(["<image>"], special_tokens=True)
    vlm = VLMEncoder(rich, settings)
    vlm.media = {"image": MediaTokens("<image>", rich.convert_tokens_to_ids("<image>"), 3, "", "", None)}
    seen = [{"role": "user", "content": "<image>\nUSR1 asks.", "images": ["a.png"]}, *ASKED[1:]]
    example = vlm.encode(Record("a", seen, "f:1"))
    assert example.input_ids.count(rich.convert_tokens_to_ids("<image>")) == 3 and example.media == {"image": ["a.png"]}
    assert WORD.findall("".join(runs(rich, example))) == ["ANS1"]


@pytest.mark.parametrize(("chat", "tools"), [("call", []), ("one turn", [TOOL])])
def test_calls_and_tools_that_a_template_leaves_out_drop_the_record(chat, tools, rich):
    with pytest.raises(Dropped) as drop:
        under(rich, "eos_after_last").encode(conversation((CHATS | CALLS)[chat], tools=tools))
    assert drop.value.reason == "not_rendered"
    assert "has no place for tools" in drop.value.detail or "leaves out a tool call" in drop.value.detail


@pytest.mark.parametrize("name", [*STOPS, "eos_after_last", "llama2", "gemma"])
def test_conversation_that_the_assistant_opens_is_trained_or_dropped(name, rich):
    enc = under(rich, name)
    try:
        example = enc.encode(conversation([{"role": "assistant", "content": "ANS0 hello."}, *ASKED]))
    except Dropped as drop:
        assert drop.reason == "template_error"
        return
    trained = "".join(runs(rich, example))
    assert WORD.findall(trained) == ["ANS0", "ANS1"] and "USR1" not in trained


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("as_rendered", ["THK1", "ARG1", "THK2", "ANS2"]),
        ("last_only", ["ARG1", "THK2", "ANS2"]),
        ("none", ["ARG1", "ANS2"]),
    ],
)
def test_which_reasoning_is_trained(reasoning, expected, rich):
    example = under(rich, "reasoning", reasoning=reasoning).encode(conversation(THOUGHT, tools=[TOOL]))
    assert WORD.findall("".join(runs(rich, example))) == expected


def test_block_of_the_prompt_alone_is_kept_dropped_or_trained_behind(rich):
    path = str(FOLDER / "think_in_prompt.jinja")
    wanted = conversation([*ASKED, *MORE])
    texts = {}
    for choice in ("keep", "drop", "train"):
        enc = encoder(rich, TemplateConfig(file=path, prompt_block=choice), max_length=10_000)
        found = examples(enc, wanted)
        prompt = enc.encode_prompt(wanted).input_ids
        texts[choice] = [rich.decode(prompt)[-24:], *(text for each in found for text in runs(rich, each))]
        is_prefix = found[-1].input_ids[: len(prompt)] == prompt
        assert is_prefix is (choice != "keep") and bool(enc.locator.remarks()) is (choice == "keep")
    assert texts == {
        "keep": ["re?<|Assistant|><think>\n", "ANS1 is it.<|eos|>", "ANS2 yes.<|eos|>"],
        "drop": [">USR2 more?<|Assistant|>", "ANS1 is it.<|eos|>", "ANS2 yes.<|eos|>"],
        "train": [
            "re?<|Assistant|><think>\n",
            "\n</think>\n\nANS1 is it.<|eos|>",
            "\n</think>\n\nANS2 yes.<|eos|>",
        ],
    }


def test_block_that_goes_when_the_conversation_goes_on_is_said_or_trained_behind(rich):
    path = str(FOLDER / "reasoning.jinja")
    wanted = conversation([*ASKED, *MORE])
    keeps = encoder(rich, TemplateConfig(file=path), max_length=10_000)
    assert "takes out of earlier responses" in keeps.locator.remarks()[0] and len(examples(keeps, wanted)) == 1
    trains = encoder(rich, TemplateConfig(file=path, prompt_block="train"), max_length=10_000)
    found = examples(trains, wanted)
    assert not trains.locator.remarks() and len(found) == 2
    for number, example in enumerate(found):
        part = conversation([*ASKED, *MORE][: 2 * number + 2])
        prompt = trains.encode_prompt(part).input_ids
        assert example.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("handling", ["keep", "escape", "error"])
def test_control_tokens_in_texts_are_counted_escaped_or_refused(handling, rich):
    enc = under(rich, "reasoning", control_tokens=handling)
    said = record("a <|im_end|> b", "ANS1.")
    if handling == "error":
        with pytest.raises(RecordError, match="holds the control token <|im_end|>"):
            enc.encode(said)
        return
    example = enc.encode(said)
    assert example.notes["control tokens in texts"] == (handling == "keep")
    assert example.input_ids.count(rich.convert_tokens_to_ids("<|im_end|>")) == (3 if handling == "keep" else 2)


def test_prompt_may_end_with_the_beginning_of_a_response(rich):
    enc = under(rich, "end_with_next", continue_final_message=True)
    prompt = enc.encode_prompt(conversation([*ASKED, MORE[0], {"role": "assistant", "content": "ANS2 it is "}]))
    assert rich.decode(prompt.input_ids).endswith("<|/usr|><|bot|>ANS2 it is") and prompt.reference is None


def test_family_that_refuses_system_messages_names_the_setting(rich):
    with pytest.raises(Dropped) as drop:
        under(rich, "gemma").encode(conversation(CHATS["system"]))
    assert "encoding.ignore_system_prompt" in drop.value.detail
    assert under(rich, "gemma", ignore_system_prompt=True).encode(conversation(CHATS["system"])).num_trained


def test_truncation_by_tokens_keeps_bos(rich):
    rich.bos_token = "[gMASK]"  # the tokenizer's own begins each turn
    template = TemplateConfig(file=str(FOLDER / "end_is_header.jinja"))
    enc = encoder(rich, template, truncation_unit="tokens", max_length=12)
    example = enc.encode(conversation([*ASKED, *MORE]))
    assert rich.decode(example.input_ids[:1]) == "[gMASK]" and len(example.input_ids) == 12


def test_empty_think_block_in_the_prompt_is_not_trained(rich):
    """Its opening stands in the prompt, and its end is no answer."""
    example = under(rich, "reasoning").encode(conversation(ASKED))
    assert runs(rich, example) == ["ANS1 is it.<|im_end|>"]
    called = under(rich, "reasoning").encode(conversation(CALLED[:2]))  # the line end belongs to the call
    assert runs(rich, called) == ['\n<|tool_call_start|>weather({"city": "ARG1"})<|tool_call_end|><|im_end|>']
    without = under(rich, "reasoning", variables={"enable_thinking": False})
    assert without.encode(conversation(ASKED)).input_ids == example.input_ids
    prompt = without.encode_prompt(conversation(ASKED)).input_ids
    assert example.input_ids[: len(prompt)] == prompt


def test_special_token_is_never_cut(rich):
    """`<think>` of the prompt and `</think>` of an answer share their first character."""
    enc = under(rich, "think_in_prompt")
    example = enc.encode(conversation([ASKED[0], {"role": "assistant", "content": ""}, *MORE]))
    control = [index for index in example.input_ids if index in enc.tokenize.added]
    assert rich.decode(control) == "<|im_start|><|User|><|Assistant|><|eos|><|User|><|Assistant|><|eos|>"
    assert runs(rich, example) == ["<|eos|>", "ANS2 yes.<|eos|>"]


def test_ids_are_those_of_the_whole_text_but_for_counted_splits(rich):
    enc = under(rich, "reasoning")
    example = enc.encode(conversation([*ASKED, *MORE]))
    text = enc.template.render([*ASKED, *MORE], [], prompt=False)
    whole = rich(text, add_special_tokens=False)["input_ids"]
    assert (example.input_ids == whole) is (example.notes["tokens split where a prompt ends"] == 0)
    assert rich.decode(example.input_ids) == rich.decode(whole)


def test_conversation_of_a_known_shape_is_found_as_with_marks(rich, monkeypatch):
    """Rendered once instead of four times; its texts differ in length, and one is what the template looks for."""
    others = [record("Q", "A.", "Again?", "Yes, again."), record("longer " * 9 + "x", "b", "c", "d e f")]
    looked_for = record("Q", "<think>no</think>\n\nA.", "Again?", "<think>hm</think>\n\nYes.")
    fresh = [under(rich, "qwen3").encode(each) for each in (*others, looked_for)]
    enc, rendered = under(rich, "qwen3"), []
    enc.encode(record("first", "one", "of", "all"))
    render = enc.template.render
    monkeypatch.setattr(enc.template, "render", lambda *given: rendered.append(given) or render(*given))
    assert [enc.encode(each) for each in others] == fresh[:2] and len(rendered) == 2
    assert enc.encode(looked_for) == fresh[2] and len(rendered) > 4


def test_template_that_renders_a_known_shape_otherwise_is_noticed(rich, tmp_path):
    path = tmp_path / "counts.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.content | length > 9 %}<|sys|>{% endif %}<|{{ m.role }}|>{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    enc = encoder(rich, TemplateConfig(file=str(path)))
    assert runs(rich, enc.encode(record("a", "b"))) == ["b</s>"]
    assert rich.decode(enc.encode(record("a" * 12, "b")).input_ids).startswith("<|sys|><|user|>aaaaaaaaaaaa</s>")


def test_marks_in_a_message_are_its_own_text(rich):
    """Letters of which marks are made may stand in a conversation."""
    said = record("\ua500\ua001 and \ua508\ua002", "\ua510\ua003 too")
    example = under(rich, "reasoning").encode(said)
    assert "".join(runs(rich, example)) == "\ua510\ua003 too<|im_end|>"


def test_template_that_looks_at_the_beginning_of_a_message_is_read_all_the_same(rich, tmp_path):
    """A mark would hide the beginning; other messages keep theirs."""
    path = tmp_path / "peeks.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.content.startswith('USR') %}<|user|>{% else %}<|assistant|>{% endif %}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    enc = encoder(rich, TemplateConfig(file=str(path)))
    assert runs(rich, enc.encode(conversation([*ASKED, *MORE]))) == ["ANS1 is it.</s>", "ANS2 yes.</s>"]


def test_template_by_name_is_used_for_tools(rich):
    rich.chat_template = {
        "default": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
        "tool_use": "tools:{{ tools | tojson }}{% for m in messages %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}</s>{% endfor %}",
    }
    enc = encoder(rich)
    with_tools = rich.decode(enc.encode(conversation(CALLED, tools=[TOOL])).input_ids)
    assert with_tools.startswith("tools:") and "ARG1" in with_tools
    assert not rich.decode(enc.encode(conversation(ASKED)).input_ids).startswith("tools:")


def test_template_for_tools_has_an_end_of_calls_of_its_own(rich):
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    calls = (
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<|/tools|>{% else %}<|eos|>{% endif %}{% endfor %}"
    )
    prompt = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    rich.chat_template = {
        "default": turns + "<|eos|>{% endfor %}" + prompt,
        "tool_use": "{{ tools | tojson }}" + turns + calls + prompt,
    }
    enc = encoder(rich, max_length=10_000)
    assert rich.decode(enc.end_of_call()) == "<|/tools|>" and rich.decode(enc.end_of_turn()) == "<|eos|>"
    found = [text for each in examples(enc, conversation(CALLED, tools=[TOOL])) for text in runs(rich, each)]
    assert found == ['{"name": "weather", "arguments": {"city": "ARG1"}}<|/tools|>', "ANS2 is it.<|eos|>"]


def test_text_goes_as_parts_to_a_template_that_takes_only_these(rich, tmp_path):
    path = tmp_path / "parts.jinja"
    path.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    enc = encoder(rich, TemplateConfig(file=str(path)))
    assert runs(rich, enc.encode(conversation(ASKED))) == ["ANS1 is it.</s>"]


def test_date_is_that_of_the_configuration(rich, tmp_path):
    path = tmp_path / "today.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    pinned = encoder(rich, TemplateConfig(file=str(path), date="2026-01-31"))
    assert rich.decode(pinned.encode(conversation(ASKED)).input_ids).startswith("31 Jan 2026USR1")
    assert encoder(rich, TemplateConfig(file=str(path))).template.writes_today and not pinned.template.writes_today
