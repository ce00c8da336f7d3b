"""How fast are predictions with vLLM, against vLLM by itself and against transformers, on the same prompts?

    make vllm-env
    .venv-vllm/bin/python benchmarks/predict_throughput.py [--prompts 500] [--rounds 2]

SmolLM2-135M answers the demo's requests, greedily and in float32. All three get the same prompt ids, those that
our encoder makes. Times are from the first request to the last answer, without the start of an engine; our loop also
writes its answers to a file. Answers are compared. Plain vLLM and our loop take turns; a round is one of each.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from lightning.pytorch import Trainer

from lit_alignment import PredictionWriter, SFTDataModule, SFTModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.generation.engine import Request
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.tools.fetch import fetch
from lit_alignment.vllm.engine import engine_arguments, on_cpu, sampling_parameters
from lit_alignment.vllm.predict import predict

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = ("configs/sft/support/train.jsonl", "configs/sft/support/test.jsonl")
SETTINGS = DecodingConfig(max_new_tokens=32)
ENGINE = {"max_model_len": 512}


def records(number: int) -> list[dict]:
    """The demo's requests."""
    lines = [line for file in FILES for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines[:number]]


def parts(number: int, folder: Path) -> tuple[SFTModule, SFTDataModule, Trainer]:
    """Module, prompts, and a Trainer that writes into a folder."""
    module = SFTModule(BackboneConfig(MODEL, dtype="float32"), generation={"greedy": SETTINGS})
    data = SFTDataModule(
        module.tokenizer,
        predict=[SourceConfig(records=records(number))],
        encoding=EncodingConfig(max_length=256),
        batch_size=32,
        cache_dir=str(folder / "data"),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    callbacks = [PredictionWriter(str(folder / "out"))]
    return module, data, Trainer(accelerator="auto", callbacks=callbacks, use_distributed_sampler=False, **quiet)


def written(folder: Path) -> dict[str, str]:
    """Answers by id."""
    lines = (folder / "out/greedy.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["answers"][0]["content"] for line in map(json.loads, lines)}


def ours(number: int, folder: Path) -> tuple[float, int, dict[str, str]]:
    """Seconds, tokens and answers of our vLLM loop."""
    summary = predict(*parts(number, folder), ENGINE)
    return summary.seconds, summary.tokens, written(folder)


def transformers(number: int, folder: Path) -> tuple[float, int, dict[str, str]]:
    """The same of our transformers engine, its model's loading left out."""
    module, data, trainer = parts(number, folder)
    started: list[float] = []
    module.on_predict_start = lambda: started.append(time.perf_counter())
    trainer.predict(module, data, return_predictions=False)
    seconds = time.perf_counter() - started[0]
    lines = (folder / "out/greedy.jsonl").read_text(encoding="utf-8").splitlines()
    return seconds, sum(json.loads(line)["answers"][0]["num_tokens"] for line in lines), written(folder)


def plain(number: int, folder: Path) -> tuple[float, int, dict[str, str]]:
    """The same of vLLM's own `LLM.generate`."""
    from vllm import LLM

    module, data, trainer = parts(number, folder)
    module.trainer, trainer.datamodule = trainer, data
    data.setup("predict")
    rows = list(data.examples["predict"])
    requests = [Request(row["input_ids"], SETTINGS, module.stop) for row in rows]
    parameters = [sampling_parameters(request, SETTINGS) for request in requests]
    dtype = {"dtype": "float32", "enforce_eager": on_cpu()}
    arguments = engine_arguments({"model": str(fetch(MODEL)), "generation_config": "vllm", **dtype, **ENGINE})
    engine = LLM(**{name: getattr(arguments, name) for name in ("model", "generation_config", *dtype, *ENGINE)})
    start = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": row["input_ids"]} for row in rows], parameters)
    seconds = time.perf_counter() - start
    texts = {row["id"]: output.outputs[0].text for row, output in zip(rows, outputs, strict=True)}
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    engine.llm_engine.engine_core.shutdown()
    return seconds, tokens, texts


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    fetch(MODEL)
    found: dict[str, list[tuple[float, int, dict[str, str]]]] = {}
    for number in range(options.rounds):
        ways = [plain, ours] if number % 2 == 0 else [ours, plain]
        for way in [*ways, transformers] if number == options.rounds - 1 else ways:
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(way.__name__, []).append(way(options.prompts, Path(folder)))
    names = {"plain": "vLLM by itself", "ours": "our loop on vLLM", "transformers": "our transformers engine"}
    reference = found["plain"][0][2]
    best = min(seconds for seconds, _, _ in found["plain"])
    print("\n| way | seconds | tokens/s | of plain vLLM's speed | same answers |\n|---|---|---|---|---|")
    for way, name in names.items():
        times = [seconds for seconds, _, _ in found[way]]
        _, tokens, answers = found[way][0]
        same = sum(answers[key] == text for key, text in reference.items())
        listed = ", ".join(f"{seconds:.1f}" for seconds in times)
        rate = f"{tokens / min(times):.0f} | {best / min(times):.2f}"
        print(f"| {name} | {listed} | {rate} | {same} of {len(reference)} |")


if __name__ == "__main__":
    main()
