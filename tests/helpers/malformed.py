"""Malformed records of every form: listed by hand with their kind, and made by mutating a valid record.

A file of a form is JSONL: some valid records, then what is wrong. `load` reads it as a command would.
"""

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_alignment import (
    ClassificationDataModule,
    PassageDataModule,
    RAGDataModule,
    RetrieverDataModule,
    RewardDataModule,
    SFTDataModule,
    VLMDataModule,
)
from lit_alignment.data.multimodal.media import FileReader, MediaTokens
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.tools.sample import main as sample

ROOT = Path(__file__).parents[2]
PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
Kind = Literal["deep", "huge", "wrong type", "wrong encoding", "cut off", "hostile"]
Record = dict[str, Any]

ASK, ANSWER = {"role": "user", "content": "the scale"}, {"role": "assistant", "content": "does not work"}
OTHER = {"role": "assistant", "content": "works"}
CALL = {"id": "call00000", "type": "function", "function": {"name": "find", "arguments": {"x": "y"}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
COMMON: Record = {"id": "a", "label": None, "meta": {"source": "test"}}
# A valid record of each form.
FORMS: dict[str, Record] = {
    "chat": {**COMMON, "messages": [ASK, {**ANSWER, "weight": 0.5, "train": True}]},
    "sharegpt": {"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    "alpaca": {"id": "a", "system": "be kind", "instruction": "order", "input": "two", "output": "yes"},
    "completion": {"id": "a", "prompt": "order", "completion": "yes"},
    "tools": {
        "id": "a",
        "tools": [TOOL],
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "reasoning_content": "b", "tool_calls": [CALL]},
            {"role": "tool", "name": "find", "tool_call_id": "call00000", "content": "found"},
            ANSWER,
        ],
    },
    "single_label": {"id": "a", "messages": [ASK], "label": "good", "meta": {}},
    "multi_label": {"id": "a", "messages": [ASK], "label": ["good", 1]},
    "regression": {"id": "a", "messages": [ASK], "label": [0.5, 1, -2.0]},
    "pairs": {"id": "a", "context": [ASK], "chosen": ANSWER, "rejected": OTHER, "margin": 0.5, "subset": "x"},
    "ranking": {"id": "a", "prompt": "q", "candidates": ["a", {"id": "x", "content": "b"}], "ranking": [2, 1]},
    "answers": {
        "id": "a",
        "messages": [ASK],
        "answers": [{"id": "0", "content": "a"}, {"id": "1", "content": "b"}],
        "rewards": {"0": 0.5, "1": 1},
    },
    "judged": {"id": "a", "prompt": "q", "completion": "yes", "label": True},
    "steps": {"id": "a", "prompt": "q", "steps": ["one", "two"], "labels": [1, 0]},
    "passages": {"id": "a", "title": "scale", "text": "the scale is red"},
    "questions": {"id": "a", "query": "what", "positive": {"title": "scale", "text": "red"}, "negatives": ["order"]},
    "rag": {"id": "a", "messages": [ASK, ANSWER], "relevant": ["p1", 2], "meta": {}},
    "multimodal": {
        "id": "a",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what"}]},
            ANSWER,
        ],
    },
    "predictions": {
        "id": "a",
        "dataset": "val",
        "messages": [ASK],
        "label": None,
        "meta": {},
        "answers": [{"id": "0", "content": "a", "finish_reason": "stop", "num_tokens": 2}],
        "rewards": {"0": 1.5},
    },
}
REQUIRED = {  # fields without which a record of the form says too little, so that each wrong type of them is an error
    "chat": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "completion": "prompt",
    "tools": "messages",
    "single_label": "label",
    "multi_label": "label",
    "regression": "label",
    "pairs": "chosen",
    "ranking": "candidates",
    "answers": "answers",
    "judged": "completion",
    "steps": "steps",
    "passages": "text",
    "questions": "query",
    "rag": "messages",
    "multimodal": "messages",
    "predictions": "answers",
}
WRONG: list[Any] = [None, True, 7, -0.5, "x", "", [], [None], [[]], [3, "x"], {}, {"x": 1}]
# What stands in the place of any text or field: JSON as text, since some of it is none that `json.dumps` writes.
HOSTILE = {
    "escape sequences": '"\\u001b[2J\\u001b]0;title\\u0007\\u202egnp.exe"',
    "template code": '"{{ 7 * 7 }}{% for x in range(10) %}"',
    "path": '"../../../etc/passwd\\u0000.png"',
    "markup": '"[/bold][link=x][/INST]<script>"',
    "huge integer": "1" + "0" * 400,
    "infinity": "1e999",
    "not a number": "NaN",
}


def cases(form: str) -> Iterator[tuple[Kind, str, bytes]]:
    """Malformed or hostile files of a form, each with its kind and a name; some hostile ones are valid."""
    valid, field = FORMS[form], REQUIRED[form]
    line = json.dumps(valid)

    def with_json(name: str, text: str) -> bytes:
        """The valid record, and one with another id in which a field is replaced by JSON as text."""
        rest = {key: value for key, value in valid.items() if key != name} | ({"id": "b"} if name != "id" else {})
        return f"{line}\n{json.dumps(rest)[:-1]}, {json.dumps(name)}: {text}}}\n".encode()

    for depth in (200, 100_000):
        yield "deep", f"{depth} lists", b"[" * depth + b"]" * depth
        yield "deep", f"{depth} lists in a field", with_json("meta", "[" * depth + "]" * depth)
        yield "deep", f"{depth} objects in {field}", with_json(field, '{"a":' * depth + "1" + "}" * depth)
    yield "huge", "5000 digits", with_json("meta", "9" * 5000)
    yield "huge", f"5000 digits in {field}", with_json(field, "9" * 5000)
    yield "huge", "400 digits as id", with_json("id", "9" * 400)
    yield "huge", f"100 kB in {field}", with_json(field, json.dumps("x " * 50_000))
    yield "huge", f"10000 items in {field}", with_json(field, json.dumps([0] * 10_000))
    for value in WRONG:
        yield "wrong type", f"{field} is {json.dumps(value)}", with_json(field, json.dumps(value))
        yield "wrong type", f"the record is {json.dumps(value)}", f"{line}\n{json.dumps(value)}\n".encode()
    yield "wrong type", "id is a list", with_json("id", "[1]")
    yield "wrong encoding", "UTF-16", line.encode("utf-16")
    yield "wrong encoding", "UTF-16 without a mark", line.encode("utf-16-le")
    yield "wrong encoding", "Latin-1", line.replace("the", "th\xe9").replace('"a"', '"\xe9"').encode("latin-1")
    yield "wrong encoding", "a lone surrogate as id", with_json("id", '"\\ud800"')
    yield "wrong encoding", "a lone surrogate in meta", with_json("meta", '{"x": ["\\udfff"]}')
    yield "wrong encoding", "a lone surrogate in a key", with_json("meta", '{"\\ud800": 1}')
    for path in list(text_paths(valid)):
        broken = json.dumps(replaced(valid, path, "MARK"))
        name = "/".join(map(str, path))
        yield "wrong encoding", f"a lone surrogate in {name}", broken.replace("MARK", "b\\ud800").encode()
    yield "wrong encoding", "NUL bytes", line.encode() + b"\n" + b"\0" * 4096
    for share in (0.1, 0.5, 0.9):
        yield "cut off", f"at {share}", f"{line}\n{line[: int(len(line) * share)]}".encode()
    yield "cut off", "an empty file", b""
    yield "cut off", "blank lines", b"\n \n\t\n"
    yield "cut off", "two records on a line", f"{line} {line}\n".encode()
    yield "hostile", f"{field} twice", with_json(field, f'1, "{field}": {json.dumps(valid[field])}')
    for name, text in HOSTILE.items():
        yield "hostile", f"{name} in {field}", with_json(field, text)
        yield "hostile", f"{name} as id", with_json("id", text)
        yield "hostile", f"{name} in meta", with_json("meta", f'{{"x": {text}}}')
        for path in list(text_paths(valid)):
            broken = json.dumps(replaced(valid, path, "MARK")).replace('"MARK"', text)
            yield "hostile", f"{name} in {'/'.join(map(str, path))}", broken.encode()


Path_ = tuple[str | int, ...]


def paths(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Where values stand in a value, at any depth, but for itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*at, key)
        yield from paths(each, (*at, key))


def text_paths(value: Any) -> Iterator[Path_]:
    """Where texts stand in a value."""
    for path in paths(value):
        found = value
        for key in path:
            found = found[key]
        if isinstance(found, str):
            yield path


def replaced(value: Any, path: Path_, new: Any) -> Any:
    """A value in which what stands at a path is another one."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 2**63, -1])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(st.characters(), max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@st.composite
def mutations(draw: st.DrawFn, valid: Record) -> Record:
    """A record in which a few values are replaced, removed, or swapped."""
    record = valid
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(record))
        if not places:
            break
        path = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "remove", "wrap", "other"])):
            case "replace":
                record = replaced(record, path, draw(VALUES))
            case "remove":
                record = _removed(record, path)
            case "wrap":
                record = replaced(record, path, [_at(record, path)])
            case "other":
                record = replaced(record, path, copy.deepcopy(_at(record, draw(st.sampled_from(places)))))
    return record


@st.composite
def mutated(draw: st.DrawFn, form: str) -> bytes:
    """A file with a valid record and one that is mutated, or whose bytes are cut."""
    record = draw(mutations(FORMS[form]))
    # Lone surrogates are escaped: a file cannot hold them otherwise.
    text = f"{json.dumps(FORMS[form] | {'id': 'valid'})}\n{json.dumps(record)}\n".encode()
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text)))] + draw(st.binary(max_size=4))
    return text


def _at(value: Any, path: Path_) -> Any:
    for key in path:
        value = value[key]
    return value


def _removed(value: Any, path: Path_) -> Any:
    value = copy.deepcopy(value)
    del _at(value, path[:-1])[path[-1]]
    return value


# Reading.

LABELS = ["bad", "fine", "good"]
MODULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("chat", "sharegpt", "alpaca", "completion", "tools"), SFTDataModule),
    **{
        kind: partial(ClassificationDataModule, labels=LABELS, problem=kind) for kind in ("single_label", "multi_label")
    },
    "regression": partial(ClassificationDataModule, labels=LABELS, problem="regression"),
    **dict.fromkeys(("pairs", "ranking", "answers"), RewardDataModule),
    "judged": partial(RewardDataModule, kind="outcomes"),
    "steps": partial(RewardDataModule, kind="steps"),
    "passages": PassageDataModule,
    "questions": RetrieverDataModule,
    "rag": RAGDataModule,
}


TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The tiny model's, with a placeholder of images, and a template that writes tools."""
    loaded = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    loaded.add_special_tokens({"additional_special_tokens": ["<image>"]})
    loaded.chat_template = TEMPLATE
    return loaded


def load(form: str, path: Path, cache_dir: Path) -> None:
    """Read a file of a form as commands do, in training and in predict, up to the batches."""
    if form == "predictions":
        for shape in ("pairs", "chats"):
            sample([str(path), "--strategy", "best_of_n", "--form", shape, "--out", f"{path}.{shape}", "--overwrite"])
        return
    kind = MODULES.get(form) or partial(
        VLMDataModule,
        media={
            "image": MediaTokens(
                "<image>", tokenizer().convert_tokens_to_ids("<image>"), 2, "", "", FileReader("image", [], 10**6)
            )
        },
    )
    source = [SourceConfig(str(path))]
    data = kind(tokenizer(), train=source, predict=source, cache_dir=str(cache_dir), num_proc=1)
    for stage, wanted in (("fit", form != "passages"), ("predict", form != "questions")):
        if wanted:
            data.setup(stage)
    if form == "passages":
        list(data.predict_dataloader())
