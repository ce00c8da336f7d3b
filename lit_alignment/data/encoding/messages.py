"""From one raw record, in any of the common chat forms, to one validated conversation."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_alignment.data.sources.values import Misfit, parse_json
from lit_alignment.errors import RecordError

Role = Literal["system", "user", "assistant", "tool"]
Message = dict[str, Any]  # role, content and, where given, train, weight, tool_calls, name, tool_call_id, ...

IGNORE_INDEX = -100
LARGEST = 3.4028234663852886e38  # float32

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# What a template may look at; everything else stays out of the rendering.
TEMPLATE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")


@dataclass
class Record:
    """A conversation with what else its line said.

    Args:
        id: The record's own id, or its position in the file.
        messages: Validated messages; roles are system, user, assistant or tool.
        where: File and line, for error messages.
        label: A reference answer or class, if there is one.
        meta: Anything else to carry into the predictions.
        tools: Tool descriptions for the template.
    """

    id: str
    messages: list[Message]
    where: str
    label: Any = None
    meta: Any = None
    tools: list[Any] = field(default_factory=list)


def read_messages(raw_messages: list[Any], record: dict[str, Any], where: str) -> list[Message]:
    """The validated messages of a record."""
    return [read_message(message, index, where) for index, message in enumerate(raw_messages)]


def read_record(
    raw: object,
    where: str,
    position: int,
    read: Callable[[list[Any], dict[str, Any], str], list[Message]] = read_messages,
) -> Record:
    """Return the conversation of one raw record.

    Read are `messages` (our own and OpenAI's form, with `tools`), `conversations` (ShareGPT),
    `instruction`/`input`/`output` (Alpaca), and `prompt`/`completion`.

    Args:
        raw: The parsed JSON value.
        where: File and line.
        position: Index in the file, the id of a record that has none.
        read: Makes the messages of the raw ones, the record and its place.

    Raises:
        RecordError: Naming the field and the fix.
    """
    if not isinstance(raw, dict):
        raise RecordError(where, "", f"the record is {value_kind(raw)}, not an object", "Write one JSON object a line.")
    messages = read(_raw_messages(raw, where), raw, where)
    tools = [] if raw.get("tools") is None else raw["tools"]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        problem = f"is {value_kind(tools)}" if not isinstance(tools, list) else "holds what is no object"
        raise RecordError(where, "tools", problem, "Make it a list of {type, function} objects.")
    return Record(
        id=read_id(raw.get("id"), "id", where, position),
        messages=messages,
        where=where,
        label=raw.get("label"),
        meta=raw.get("meta"),
        tools=tools,
    )


def without_answer(raw: object) -> object:
    """A raw record whose prompt needs no completion beside it."""
    return {"completion": [], **raw} if isinstance(raw, dict) and "prompt" in raw else raw


def read_id(value: object, name: str, where: str, position: int) -> str:
    """An id as text; the position if there is none.

    Raises:
        RecordError: If it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise RecordError(where, name, f"is {value_kind(value)}", "Use a string or a whole number.")
    return str(position if value is None else value)


def finite(value: object) -> float | None:
    """A number that a float of 32 bits can hold, as in which it is kept; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else None  # type: ignore[arg-type]


def _raw_messages(raw: dict[str, Any], where: str) -> list[Any]:
    """Find the list of messages in whichever form the record has."""
    if "messages" in raw:
        name, messages = "messages", raw["messages"]
    elif "conversations" in raw:
        name, messages = "conversations", raw["conversations"]
    elif "instruction" in raw and "output" in raw:
        name = "instruction"
        question = _text(raw, "instruction", where)
        if raw.get("input"):
            question += "\n\n" + _text(raw, "input", where)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _text(raw, "output", where)},
        ]
    elif "prompt" in raw and "completion" in raw:
        name = "prompt"
        sides = {"prompt": "user", "completion": "assistant"}
        messages = []
        for side, role in sides.items():
            value = raw[side]
            messages += value if isinstance(value, list) else [{"role": role, "content": _text(raw, side, where)}]
    else:
        found = ", ".join(f"'{key}'" for key in raw) or "nothing"
        raise RecordError(
            where,
            "messages",
            f"is missing (found: {found})",
            "Give 'messages', or 'conversations', 'instruction' and 'output', or 'prompt' and 'completion'; or say by "
            "the source's 'columns' what holds them.",
        )
    if not isinstance(messages, list):
        raise RecordError(where, name, f"is {value_kind(messages)}", "Make it a list of {role, content} objects.")
    if not messages:
        raise RecordError(where, name, "is empty", "Give at least one message.")
    return with_system(raw, name, messages, where)


def with_system(raw: dict[str, Any], name: str, messages: list[Any], where: str) -> list[Any]:
    """Messages behind the record's `system` prompt, if it has one; `messages`, as `name`, hold their own."""
    if name == "messages" or not raw.get("system"):
        return messages
    return [{"role": "system", "content": _text(raw, "system", where)}, *messages]


def read_message(raw: object, index: int, where: str) -> Message:
    """Validate one message and bring its role and loss switches to our names."""
    path = f"messages[{index}]"
    if not isinstance(raw, dict):
        raise RecordError(where, path, f"is {value_kind(raw)}", 'Write {"role": ..., "content": ...}.')
    role = raw.get("role", raw.get("from"))
    if role is None:
        raise RecordError(where, f"{path}.role", "is missing", f"Use one of {_known_roles()}.")
    if not isinstance(role, str) or role not in ROLE_NAMES:
        raise RecordError(where, f"{path}.role", f"is {role!r}", f"Use one of {_known_roles()}.")

    message: Message = {"role": ROLE_NAMES[role]}
    for key in TEMPLATE_KEYS[2:]:
        if raw.get(key) is not None:
            message[key] = raw[key] if key == "tool_calls" else _text(raw, key, where, f"{path}.")
    if not isinstance(message.get("tool_calls", []), list):
        raise RecordError(where, f"{path}.tool_calls", f"is {value_kind(raw['tool_calls'])}", "Make it a list.")
    if "tool_calls" in message:
        message["tool_calls"] = [_read_tool_call(call, f"{path}.tool_calls", where) for call in raw["tool_calls"]]
    message["content"] = _read_content(raw, path, where, may_be_missing="tool_calls" in message)

    train = raw.get("train")
    if train is None and raw.get("disable_loss"):
        train = False  # turbo-alignment writes false on every message, which leaves the role to decide
    if train is not None:
        if not isinstance(train, bool):
            raise RecordError(where, f"{path}.train", f"is {train!r}", "Use true or false.")
        message["train"] = train
    weight = raw.get("weight")
    if weight is not None:
        if (number := finite(weight)) is None or number < 0:
            raise RecordError(where, f"{path}.weight", f"is {weight!r}", "Use a number that is 0 or more.")
        message["weight"] = number
    return message


def _read_content(raw: dict[str, Any], path: str, where: str, may_be_missing: bool) -> str | None:
    """Return the text of a message; OpenAI's list of text parts is joined. Beside tool calls there may be none."""
    content = raw.get("content", raw.get("value"))
    if content is None and may_be_missing:
        return None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text") or "" for part in content]
        wrong = next((number for number, part in enumerate(parts) if not isinstance(part, str)), None)
        if wrong is not None:
            raise RecordError(
                where, f"{path}.content[{wrong}].text", f"is {value_kind(parts[wrong])}", "Make it a string."
            )
        content = "".join(parts)
    if content is None:
        raise RecordError(where, f"{path}.content", "is missing", "Give the message's text.")
    if not isinstance(content, str):
        raise RecordError(where, f"{path}.content", f"is {value_kind(content)}", "Make it a string.")
    return content


def _read_tool_call(call: object, path: str, where: str) -> dict[str, Any]:
    """Return a tool call whose arguments are an object: OpenAI sends them as a JSON string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(where, path, "holds a call without a function name", "Give {function: {name, arguments}}.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except json.JSONDecodeError as error:
            raise RecordError(
                where, path, f"has arguments that are not JSON ({error})", "Write a JSON object."
            ) from error
        except Misfit as misfit:
            raise misfit.at(where, f"{path}.arguments") from misfit
    if not isinstance(arguments, dict | None):
        raise RecordError(where, f"{path}.arguments", f"is {value_kind(arguments)}", "Write a JSON object.")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _text(raw: dict[str, Any], name: str, where: str, path: str = "") -> str:
    value = raw[name]
    if not isinstance(value, str):
        raise RecordError(where, f"{path}{name}", f"is {value_kind(value)}", "Make it a string.")
    return value


def _known_roles() -> str:
    return "system, user, assistant (or bot, gpt), tool"


def value_kind(value: object) -> str:
    """Name a JSON value's type as a person would."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
