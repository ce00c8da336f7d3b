"""`lit-alignment demo`: fine-tune a real model on CPU, and show what it answers before and after."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.callbacks.throughput import Throughput
from lit_alignment.tools import parsers
from lit_alignment.tools.fetch import fetch
from lit_alignment.tools.init.recipes import copy_recipe
from lit_alignment.trainer_cli import build

RECIPE = "sft/smollm2_lora"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(arguments: list[str]) -> None:
    """Run the demo, in the working folder."""
    options = parsers.demo().parse_args(arguments)
    console = Console()
    begin = time.perf_counter()
    if options.config == parsers.DEMO:
        copy_recipe(RECIPE)
        console.print(f"model: {fetch(MODEL)}")
    ready = time.perf_counter()

    cli = build(["--config", options.config])
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    cli.run_folder.take(trainer)
    run = Path(trainer.log_dir or trainer.default_root_dir)

    def predictions(name: str, checkpoint: str | None) -> list[dict[str, Any]]:
        console.rule(f"answers to held-out requests, {name} training")
        writer = PredictionWriter(str(run / name), overwrite=True)
        callbacks.append(writer)
        trainer.predict(module, data, return_predictions=False, ckpt_path=checkpoint)
        callbacks.remove(writer)
        path = writer.output_dir / f"{next(iter(module.generation))}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    before = predictions("before", None)
    console.rule("training")
    trainer.fit(module, data)
    after = predictions("after", "best")

    console.rule("result")
    console.print(_side_by_side(before, after))
    speed = next(callback for callback in callbacks if isinstance(callback, Throughput))
    end = time.perf_counter()
    console.print(f"exact match on {len(after)} held-out requests: {_score(before)} before, {_score(after)} after")
    console.print(f"training speed: {speed.total_tokens / speed.total_seconds:.0f} tokens/s")
    console.print(f"report: {run / 'report.html'}")
    console.print(f"export: {run / 'checkpoints' / 'export'}  (loads with from_pretrained)", soft_wrap=True)
    total = options.install_seconds + end - begin
    more = "installing and fetching" if options.install_seconds else "fetching"
    console.print(f"time: {end - ready:.0f} s for the demo, {total:.0f} s with {more} the model", soft_wrap=True)
    console.print(f"talk to it: lit-alignment chat {run / 'checkpoints' / 'export'}", soft_wrap=True)


def exact_match(line: dict[str, Any]) -> bool:
    """Whether the first answer is the reference, to the character."""
    return bool(line["answers"][0]["content"].strip() == line["label"].strip())


def _score(lines: list[dict[str, Any]]) -> str:
    return f"{sum(map(exact_match, lines))} of {len(lines)}"


def _side_by_side(before: list[dict[str, Any]], after: list[dict[str, Any]], number: int = 3) -> Table:
    """The first requests of different kinds, with what was wanted and both answers."""
    table = Table(show_lines=True)
    for heading in ("request", "wanted", "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1)
    for old, new in list(zip(before, after, strict=True))[:number]:
        answers = (line["answers"][0]["content"].strip() for line in (old, new))
        table.add_row(new["messages"][-1]["content"], new["label"], *answers)
    return table
