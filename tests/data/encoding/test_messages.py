import pytest

from lit_alignment.data.encoding.messages import read_record
from lit_alignment.errors import RecordError

EXPECTED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
    ids=["ours", "parts", "sharegpt", "alpaca", "prompt", "prompt-messages"],
)
def test_every_chat_form_gives_the_same_messages(raw):
    assert read_record(raw, "f:1", 0).messages == EXPECTED


def test_alpaca_input_follows_the_instruction_and_system_leads():
    found = read_record({"system": "s", "instruction": "do", "input": "x", "output": "y"}, "f:1", 0).messages
    assert [m["content"] for m in found] == ["s", "do\n\nx", "y"]


def test_loss_switches_and_aliases():
    raw = {
        "id": 7,
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "bot", "content": "a", "disable_loss": True},
            {"role": "assistant", "content": "b", "weight": 2, "train": True},
        ],
        "meta": {"k": 1},
        "source": "ignored",
    }
    found = read_record(raw, "f:1", 0)
    assert found.id == "7" and found.meta == {"k": 1}
    assert found.messages[1]["train"] is False
    assert found.messages[2] == {"role": "assistant", "content": "b", "weight": 2.0, "train": True}


def test_openai_tool_calls_get_arguments_as_objects():
    call = {"id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    raw = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    found = read_record(raw, "f:1", 0)
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert found.tools == raw["tools"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "d.jsonl:3: the record is a list, not an object. Write one JSON object a line."),
        ({"text": "x"}, "d.jsonl:3: field 'messages' is missing (found: 'text')"),
        ({"messages": []}, "d.jsonl:3: field 'messages' is empty"),
        ({"messages": "hi"}, "d.jsonl:3: field 'messages' is a string"),
        ({"messages": [{"content": "x"}]}, "field 'messages[0].role' is missing"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "field 'messages[0].role' is 'wizard'. Use one of"),
        ({"messages": [{"role": "user"}]}, "field 'messages[0].content' is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "field 'messages[0].content' is a number. Make it a string."),
        ({"messages": [{"role": "user", "content": "x", "weight": -1}]}, "field 'messages[0].weight' is -1"),
        ({"messages": [{"role": "user", "content": "x", "weight": float("nan")}]}, "weight' is nan"),
        ({"messages": [{"role": "user", "content": "x", "train": "no"}]}, "field 'messages[0].train' is 'no'"),
        ({"id": [1], "messages": [{"role": "user", "content": "x"}]}, "field 'id' is a list"),
        ({"id": True, "messages": [{"role": "user", "content": "x"}]}, "field 'id' is a boolean"),
        ({"messages": [{"role": "user", "content": "x", "weight": 10**400}]}, "field 'messages[0].weight' is 1000"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "messages[0].content[0].text' is a n",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "field 'messages[0].name' is a number"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": {}}, "field 'tools' is an object"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": ["f"]}, "field 'tools' holds what is no object"),
        ({"prompt": "q", "completion": "a", "system": 3}, "field 'system' is a number"),
        ({"prompt": 3, "completion": "x"}, "field 'prompt' is a number"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "not JSON",
        ),
        *(
            ({"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]}, message)
            for function, message in (
                ({"name": 3, "arguments": {}}, "holds a call without a function name"),
                ({"name": "f", "arguments": [1]}, "tool_calls.arguments' is a list"),
                ({"name": "f", "arguments": "3"}, "tool_calls.arguments' is a number"),
                ({"name": "f", "arguments": "[" * 9999}, "tool_calls.arguments' is nested deeper than 100 levels"),
                ({"name": "f", "arguments": '{"a": "\\ud800"}'}, "tool_calls.arguments.a' holds \\ud800"),
                ({"name": "f", "arguments": '{"a": NaN}'}, "tool_calls.arguments.a' is nan"),
            )
        ),
    ],
)
def test_bad_record_names_file_line_field_and_fix(raw, message):
    with pytest.raises(RecordError) as error:
        read_record(raw, "d.jsonl:3", 0)
    assert str(error.value).startswith("d.jsonl:3: ") and message in str(error.value)
