"""Does a retriever find more when it is trained end to end, and still more when its passage encoder is trained too?

    python benchmarks/rag_retrieval.py data      # the knowledge base and its questions alone
    python benchmarks/rag_retrieval.py frozen    # train and test one way: frozen, query or both; up to an hour each

The knowledge base is the documentation of Python's standard library: each docstring is a passage with the qualified
name as its title. Of docstrings with a summary and a body, the summary is taken out of the passage and becomes a
question, with the name taken out; the answer is the name. all-MiniLM-L6-v2 retrieves, SmolLM2-135M answers, as
configs/rag/stdlib_smollm2.yaml says. Recall is that of the trained retriever over the whole index; an answer is an
exact match or not.
"""

import ast
import json
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from lit_alignment.tools import index
from lit_alignment.tools.fetch import fetch
from lit_alignment.trainer_cli import build

DATA = Path("data/stdlib")
CONFIG = "configs/rag/stdlib_smollm2.yaml"
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2")
SIZES = {"test": 150, "val": 50}  # the rest trains
# Tests, copies of other packages, and tables are no documentation.
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "ensurepip",
    "encodings",
}
SHORTEST_BODY, SHORTEST_SUMMARY = 60, 25  # characters
EVERY = "--trainer.callbacks.every_n_steps=40"
WAYS = {
    "frozen": ["--model.train_retriever=none"],
    "query": ["--model.train_retriever=query"],
    "both": ["--model.train_retriever=both", "--trainer.callbacks+=lit_alignment.IndexRefresh", EVERY],
}
Entry = tuple[str, str]  # qualified name, docstring


def entries() -> list[Entry]:
    """Public names of the standard library with their docstrings, each text once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Entry] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        hidden = any(part.startswith("_") and part != "__init__" for part in parts)
        if parts[0] not in sys.stdlib_module_names or SKIPPED & set(parts) or hidden:
            continue
        name = ".".join(part for part in parts if part != "__init__")
        for entry in documented(ast.parse(file.read_text(encoding="utf-8")), name):
            found.setdefault(entry[1], entry)
    return list(found.values())


def documented(node: ast.AST, name: str) -> Iterator[Entry]:
    """A module, class or function with its docstring, and the public ones inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
        for child in node.body:
            own = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if own and not child.name.startswith("_"):
                yield from documented(child, f"{name}.{child.name}")


def question(name: str, summary: str) -> str | None:
    """The summary without any part of the name, or None if too little is left."""
    words = "|".join(re.escape(part) for part in sorted(set(name.split(".")), key=len, reverse=True))
    left = " ".join(re.sub(rf"(?i)\b({words})\b(\(\))?", "...", " ".join(summary.split())).split())
    return left if len(left.replace("...", "")) >= SHORTEST_SUMMARY else None


def write_data() -> dict[str, int]:
    """Write passages and questions; number of records by file."""
    passages, asked = [], []
    for name, text in entries():
        summary, _, body = text.partition("\n\n")
        query = question(name, summary) if len(body) >= SHORTEST_BODY else None
        passages.append({"id": name, "title": name, "text": body.strip() if query else text})
        if query:
            asked.append((name, query))
    names = [passage["id"] for passage in passages]
    passages = [passage for passage in passages if names.count(passage["id"]) == 1]
    known = {passage["id"] for passage in passages}
    asked = [each for each in asked if each[0] in known]
    random.Random(0).shuffle(asked)
    parts, start = {"passages": passages}, 0
    for split, size in [*SIZES.items(), ("train", len(asked))]:
        part = asked[start : start + size]
        start += size
        parts[split] = [
            {
                "id": name,
                "messages": [
                    {"role": "user", "content": f"What in Python's standard library is this: {query}"},
                    {"role": "assistant", "content": name},
                ],
                "relevant": [name],
            }
            for name, query in part
        ]
        parts[f"queries.{split}"] = [
            {"query": r["messages"][0]["content"], "relevant": r["relevant"]} for r in parts[split]
        ]
    DATA.mkdir(parents=True, exist_ok=True)
    for name, records in parts.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (DATA / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(records) for name, records in parts.items()}


def run(way: str) -> None:
    """Train one way, and print recall before and after, and exact matches."""
    for model in MODELS:
        fetch(model)
    settings = WAYS[way]
    place = [f"--model.index.path=runs/stdlib_{way}/index"]
    queries = ["--queries", str(DATA / "queries.test.jsonl")]
    index.main(["build", "--config", CONFIG, *place, "--overwrite"])
    index.main(["eval", "--config", CONFIG, *place, *queries, "--json", f"runs/stdlib_{way}/before.json"])
    begin = time.perf_counter()
    trained = build(["fit", "--config", CONFIG, *settings, *place], run=True)
    seconds = time.perf_counter() - begin
    best = trained.trainer.checkpoint_callback.best_model_path
    checkpoint = [f"--ckpt_path={best}"]
    if way == "both":
        index.main(["build", "--config", CONFIG, *place, *checkpoint, "--overwrite"])
    trained_towers = [] if way == "frozen" else checkpoint
    after = Path(f"runs/stdlib_{way}/after.json")
    index.main(["eval", "--config", CONFIG, *place, *queries, *trained_towers, "--json", str(after)])
    writer = json.dumps(
        [{"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": f"runs/stdlib_{way}"}}]
    )
    build(
        ["predict", "--config", CONFIG, *settings[:2], *place, *checkpoint, f"--trainer.callbacks={writer}"], run=True
    )
    lines = [json.loads(line) for line in Path(f"runs/stdlib_{way}/greedy.jsonl").read_text().splitlines()]
    matches = sum(line["answers"][0]["content"].strip() == line["label"] for line in lines) / len(lines)
    found = json.loads(after.read_text())
    cells = [f"{found[name]:.3f}" for name in ("recall@1", "recall@5", "recall@20", "mrr")]
    print(f"\n| {way} | {' | '.join(cells)} | {matches:.3f} | {seconds:.0f} s |")


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""
    if chosen not in ("data", *WAYS):
        sys.exit(__doc__)
    print(write_data())
    if chosen in WAYS:
        run(chosen)
