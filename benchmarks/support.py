"""The demo's support requests as a task of benchmarks: the model that is to become better, and exact match."""

import json
import random
import runpy
from pathlib import Path

import numpy as np

from benchmarks.stages import (
    BEST,
    BFLOAT16,
    EXPORT,
    Model,
    Values,
    callbacks,
    fit,
    predict,
    read,
    sources,
    write,
)

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SFT = "configs/sft/smollm2_lora.yaml"
DEMO = Path("configs/sft/support")
LONGEST_ROUTE = 36  # tokens; no reference has more than 34
CHOOSE, HELD_OUT = 50, 500  # requests to choose settings on, and to report


def write_requests(folder: Path, choose: int, held_out: int) -> tuple[Path, Path]:
    """Fresh held-out requests, none of which the demo has: some to choose on, some to report."""
    known = {record["messages"][1]["content"] for name in ("train", "test") for record in read(DEMO / f"{name}.jsonl")}
    generate = runpy.run_path(str(DEMO / "generate.py"))["records"]
    drawn = generate(choose + held_out + len(known), True, random.Random("fresh requests"))
    fresh = [record for record in drawn if record["messages"][1]["content"] not in known][: choose + held_out]
    parts = fresh[:choose], fresh[choose:]
    return write(folder / "choose.jsonl", parts[0]), write(folder / "held_out.jsonl", parts[1])


def begun(folder: Path, tiny: bool) -> Model:
    """Options and checkpoint of the demo's model, which every seed continues."""
    train = write(folder / "train.jsonl", read(DEMO / "train.jsonl")[: 16 if tiny else None])
    options = [f"--config={SFT}", *BFLOAT16, sources("train", train), callbacks(BEST, EXPORT)]
    return options, fit(folder / "sft", options, [train])


def answered(folder: Path, name: str, asked: Path, model: Model, longest: int = LONGEST_ROUTE) -> Values:
    """Whether each greedy answer of a model is right to the character, [prompts].

    Args:
        folder: Of the task; the answers stand in it.
        name: Of the model.
        asked: File of the prompts, with their right answers.
        model: Options and checkpoint.
        longest: Tokens of an answer.
    """
    options, checkpoint = model
    target = folder / "predictions" / f"{asked.stem}-{name}".replace(" ", "-")
    decoding = json.dumps({"greedy": {"max_new_tokens": longest}})
    given = [f"--ckpt_path={checkpoint}", sources("predict", asked), f"--model.init_args.generation={decoding}"]
    predict(target, [*options, *given, "--data.init_args.batch_size=125"], [checkpoint, asked])
    lines = read(target / "greedy.jsonl")
    return np.array([float(line["answers"][0]["content"].strip() == line["label"].strip()) for line in lines])
