"""What the stages of several benchmarks have in common: commands that are run once, records, and intervals."""

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_alignment.trainer_cli import build

DRAWS = 5000  # of the bootstrap
BEST = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/loss"}}
LAST = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
EXPORT = {"class_path": "lit_alignment.Export"}
BFLOAT16 = ["--model.init_args.backbone.dtype=bfloat16"]  # the frozen weights; adapters stay in float32
NO_VALIDATION = ["--data.init_args.val=null", "--trainer.limit_val_batches=0"]
Record = dict[str, Any]
Values = npt.NDArray[np.float64]
Model = tuple[list[str], Path]  # options and checkpoint


def stage(folder: Path, settings: Sequence[str], inputs: Sequence[Path], make: Callable[[], object]) -> None:
    """Run a part of the benchmark, unless its folder holds what the same settings have made of the same files."""
    configs = [Path(each.removeprefix("--config=")) for each in settings if each.startswith("--config=")]
    files = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in [*inputs, *configs]}
    asked = {"settings": list(settings), "inputs": files}
    stamp = folder / "stage.json"
    if stamp.is_file() and json.loads(stamp.read_text())["asked"] == asked:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    make()
    seconds = time.perf_counter() - begin
    gc.collect()  # a Trainer and its module hold each other
    stamp.write_text(json.dumps({"asked": asked, "seconds": seconds}, indent=2) + "\n")
    print(f"{folder}: {seconds:.0f} s", flush=True)


def fit(folder: Path, arguments: list[str], inputs: Sequence[Path]) -> Path:
    """The checkpoint of a training, whose run is in a folder of its own."""
    logger = {"save_dir": folder.parent, "name": folder.name, "version": "run"}
    place = [f"--trainer.logger.init_args.{name}={value}" for name, value in logger.items()]
    stage(folder, arguments, inputs, lambda: build(["fit", *arguments, *place], run=True))
    return next((folder / "run/checkpoints").glob("*.ckpt"))


def predict(folder: Path, arguments: list[str], inputs: Sequence[Path]) -> None:
    """Predictions in a folder."""
    writer = {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(folder)}}
    quiet = ["--trainer.logger=false", f"--trainer.callbacks={json.dumps([writer])}"]
    stage(folder, arguments, inputs, lambda: build(["predict", *arguments, *quiet], run=True))


def sources(name: str, *paths: Path) -> str:
    """The option that names the files of a split."""
    return f"--data.init_args.{name}={json.dumps([{'path': str(path)} for path in paths])}"


def callbacks(*given: Record) -> str:
    """The option that gives the callbacks."""
    return f"--trainer.callbacks={json.dumps(given)}"


def continued(config: str, adapter: Path, rate: float, seed: int, saving: Record = LAST) -> list[str]:
    """Options of a training that begins with an adapter, without validation; `saving` says what it gives."""
    return [
        f"--config={config}",
        "--model.init_args.peft=null",
        f"--model.init_args.adapter={json.dumps({'path': str(adapter), 'trainable': True})}",
        f"--model.init_args.optimizer.learning_rate={rate}",
        f"--seed_everything={seed}",
        f"--data.init_args.seed={seed}",
        callbacks(saving),
        *NO_VALIDATION,
    ]


def sampling(name: str, number: int, seed: int, max_new_tokens: int) -> str:
    """The option that asks for several answers at temperature 1."""
    decoding = {"max_new_tokens": max_new_tokens, "temperature": 1.0, "num_return_sequences": number, "seed": seed}
    return f"--model.init_args.generation={json.dumps({name: decoding})}"


def read(path: Path) -> list[Record]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: Sequence[Record]) -> Path:
    """Write records, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def steps_of(checkpoint: Path) -> int:
    """Optimizer steps of a run, by the name of its checkpoint."""
    return int(checkpoint.stem.rpartition("step=")[2])


def interval(differences: Values) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval, over training seeds and prompts.

    Both are drawn anew with replacement: each draw takes as many seeds, and as many prompts, which are the same for all
    seeds.

    Args:
        differences: Of each seed and prompt, [seeds, prompts].
    """
    generator = np.random.default_rng(0)
    seeds, prompts = differences.shape
    means = [
        differences[np.ix_(generator.integers(seeds, size=seeds), generator.integers(prompts, size=prompts))].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def print_differences(title: str, hits: dict[str, Values], pairs: Sequence[tuple[str, str]]) -> None:
    """A table of differences between methods, in points.

    Args:
        title: Of the first column.
        hits: Whether each answer is right, [seeds, prompts], by method.
        pairs: The better and the worse method of each row.
    """
    print(f"\n| {title} | points | 95 % interval | of each seed |\n|---|---|---|---|")
    for better, worse in pairs:
        differences = 100 * (hits[better] - hits[worse])
        mean, low, high = interval(differences)
        each = ", ".join("{:+.1f} ({:+.1f} to {:+.1f})".format(*interval(own[None])) for own in differences)
        print(f"| {better} less {worse} | {mean:+.1f} | {low:+.1f} to {high:+.1f} | {each} |")
