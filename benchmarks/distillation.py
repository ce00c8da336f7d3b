"""Does a student learn more from a teacher's distributions than from the right answers alone?

    python -m benchmarks.distillation run --seed 0            # half an hour on one thread of two busy cores
    python -m benchmarks.distillation run --seed 0 --rates 2e-4 5e-4 1e-3     # others to choose from
    python -m benchmarks.distillation table                   # of all seeds that were run
    python -m benchmarks.distillation run --tiny              # every stage on a handful of records, in a minute
    python -m benchmarks.distillation student ADAPTER FOLDER  # only write the student

The teacher is SmolLM2-135M, fine-tuned on the demo's support requests as configs/sft/smollm2_lora.yaml says. The
student is every third layer of it, with its embeddings, and all its weights train: by distillation as
configs/distillation/support_smollm2.yaml says, or by SFT on the same 400 requests, eight of them in each of as many
optimizer steps. Measured on 500 fresh requests: KL(teacher || student) of the tokens of the right answers, in nats a
token, and exact match of greedy answers. The learning rate of a method is the one with the lowest KL on 50 other
requests, by the runs of the first seed. A seed is that of the order of records and of sampling.

Every stage is a command of lit-alignment, run in this process. What a stage writes stands under
data/distillation_proof; a stage whose settings and input files are those of the time before is passed over.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.stages import (
    EXPORT,
    LAST,
    NO_VALIDATION,
    Model,
    Record,
    callbacks,
    fit,
    print_differences,
    read,
    sources,
    stage,
    steps_of,
    write,
)
from benchmarks.support import CHOOSE, HELD_OUT, MODEL, SFT, answered, begun, write_requests
from lit_alignment.tools import merge
from lit_alignment.tools.fetch import fetch
from lit_alignment.trainer_cli import build

DATA = Path("data/distillation_proof")
DISTILLATION = "configs/distillation/support_smollm2.yaml"
METHODS = ("distillation", "SFT")
EVERY = 3  # layers of the teacher, of which the student has one
RATE = 5e-4
EPOCHS = 4
PROMPTS = 8  # of a step
TINY = 8  # requests to choose on, and held out


@dataclass(frozen=True)
class Proof:
    """What all runs share.

    Args:
        folder: Of all that is written; it has `train.jsonl`, `choose.jsonl` and `held_out.jsonl`.
        teacher: Options and checkpoint of the teacher; its adapter stands beside the checkpoint.
        student: Folder of the student.
        epochs: Of each training.
    """

    folder: Path
    teacher: Model
    student: Path
    epochs: int

    @property
    def adapter(self) -> Path:
        """Of the teacher."""
        return self.teacher[1].parent / "export"


def prepared(tiny: bool) -> Proof:
    """Requests, teacher and student."""
    folder = DATA / ("tiny" if tiny else "requests")
    write_requests(folder, *((TINY, TINY) if tiny else (CHOOSE, HELD_OUT)))
    teacher = begun(folder, tiny)
    adapter, student = teacher[1].parent / "export", folder / "student"
    weights = adapter / "adapter_model.safetensors"
    stage(student, [f"every={EVERY}"], [weights], lambda: write_student(adapter, student / "model"))
    return Proof(folder, teacher, student / "model", 1 if tiny else EPOCHS)


def write_student(adapter: Path, target: Path) -> None:
    """Every third layer of a model with its adapter merged, from the first on, as a folder of its own.

    Args:
        adapter: Of the model.
        target: Folder to write; it must not be there.
    """
    merged = target.with_name(f"{target.name}.merged")
    merge.main([str(adapter), f"--out={merged}", "--dtype=float32", "--overwrite"])
    whole, config = AutoModelForCausalLM.from_pretrained(merged), AutoConfig.from_pretrained(merged)
    kept = range(0, config.num_hidden_layers, EVERY)
    whole.model.layers = nn.ModuleList(whole.model.layers[number] for number in kept)
    whole.config.num_hidden_layers = len(kept)
    whole.config.layer_types = None
    whole.save_pretrained(target)
    AutoTokenizer.from_pretrained(merged).save_pretrained(target)


# A run.


def trained(proof: Proof, method: str, rate: float, seed: int) -> Model:
    """Options and checkpoint of a training of the student."""
    train = proof.folder / "train.jsonl"
    options = [
        f"--config={DISTILLATION if method == 'distillation' else SFT}",
        f"--model.init_args.backbone.path={proof.student}",
        f"--model.init_args.optimizer.learning_rate={rate}",
        f"--seed_everything={seed}",
        f"--data.init_args.seed={seed}",
        f"--data.init_args.batch_size={PROMPTS}",
        f"--trainer.max_epochs={proof.epochs}",
        sources("train", train),
        callbacks(LAST, EXPORT),
        *NO_VALIDATION,
    ]
    if method == "distillation":
        options.append(f"--model.init_args.teacher_adapter.path={proof.adapter}")
    else:
        options += [
            "--model.init_args.peft=null",
            "--data.init_args.packing=false",
            "--data.init_args.tokens_per_batch=null",
        ]
    folder = proof.folder / f"{method}-{rate:.0e}-{seed}"
    return options, fit(folder, options, [proof.student / "model.safetensors", train])


def divergence(proof: Proof, name: str, split: str, student: Path) -> float:
    """KL(teacher || student) of the right answers' tokens, in nats a token.

    Args:
        proof: What all runs share.
        name: Of the model.
        split: The requests' file.
        student: Folder of the model.
    """
    folder, asked = proof.folder / "divergences" / f"{split}-{name}", proof.folder / f"{split}.jsonl"
    options = [
        f"--config={DISTILLATION}",
        f"--model.init_args.backbone.path={student}",
        f"--model.init_args.teacher_adapter.path={proof.adapter}",
        sources("test", asked),
        "--trainer.logger=false",
        "--trainer.callbacks=[]",
    ]

    def measure() -> None:
        metrics = build(["test", *options], run=True).trainer.callback_metrics
        write(folder / "kl.json", [{"kl": float(metrics["test/kl"])}])

    stage(folder, options, [student / "model.safetensors", asked], measure)
    return float(read(folder / "kl.json")[0]["kl"])


def run(proof: Proof, seed: int, rates: list[float]) -> None:
    """Train by both methods, and measure.

    Args:
        proof: What all runs share.
        seed: Of all trainings.
        rates: Learning rates of both methods.
    """
    hits = answered(proof.folder, "teacher", proof.folder / "held_out.jsonl", proof.teacher)
    print(f"teacher: {hits.mean():.3f} right", flush=True)
    for method in METHODS:
        for rate in rates:
            model = trained(proof, method, rate, seed)
            name, folder = f"{method}-{rate:.0e}-{seed}", model[1].parent / "export"
            kl = {split: divergence(proof, name, split, folder) for split in ("choose", "held_out")}
            hits = answered(proof.folder, name, proof.folder / "held_out.jsonl", model)
            result = {"method": method, "rate": rate, "seed": seed, "steps": steps_of(model[1]), "kl": kl}
            write(proof.folder / "results" / f"{name}.json", [result | {"held_out": hits.tolist()}])
            print(f"{name}: {kl['held_out']:.4f} nats a token, {hits.mean():.3f} right", flush=True)
    table(proof.folder)


# Tables.


def table(folder: Path) -> None:
    """Print how all runs do, and the difference between the methods at the rates that were chosen.

    Args:
        folder: Of the proof.
    """
    results = [result for path in sorted((folder / "results").glob("*.json")) for result in read(path)]
    if {*METHODS} - {result["method"] for result in results}:
        print(f"\n{folder.name}: no seed has been run to its end")
        return
    first = min(result["seed"] for result in results)
    chosen = {method: chosen_rate(results, method, first) for method in METHODS}
    runs = {
        method: {each["seed"]: each for each in results if (each["method"], each["rate"]) == (method, rate)}
        for method, rate in chosen.items()
    }
    print("\n| training | learning rate | seed | steps | KL to choose on | KL held out | exact match |")
    print("|---|---|---|---|---|---|---|")
    for each in sorted(results, key=lambda each: (each["method"], each["rate"], each["seed"])):
        taken = " (chosen)" if each["rate"] == chosen[each["method"]] else ""
        kl = " | ".join(f"{each['kl'][split]:.4f}" for split in ("choose", "held_out"))
        match = f"{np.mean(each['held_out']):.3f}"
        print(f"| {each['method']} | {each['rate']:g}{taken} | {each['seed']} | {each['steps']} | {kl} | {match} |")
    seeds = sorted(set.intersection(*(set(runs[method]) for method in METHODS)))
    hits = {method: np.array([own[seed]["held_out"] for seed in seeds]) for method, own in runs.items()}
    print_differences(f"difference in exact match, {hits['SFT'].shape[1]} requests", hits, [METHODS])


def chosen_rate(results: list[Record], method: str, seed: int) -> float:
    """The learning rate of the run of a seed with the lowest divergence on the requests to choose on."""
    own = [each for each in results if (each["method"], each["seed"]) == (method, seed)]
    return float(min(own, key=lambda each: each["kl"]["choose"])["rate"])


def main() -> None:
    """Run a seed, print the tables, or write a student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "student"])
    parser.add_argument("paths", nargs="*", type=Path, help="of `student`: the teacher's adapter, and a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE], help="learning rates of both methods")
    parser.add_argument("--tiny", action="store_true", help="a handful of records, to see every stage run")
    options = parser.parse_args()
    if options.what == "student":
        adapter, target = options.paths
        write_student(adapter, target)
        return
    if options.what == "table":
        table(DATA / ("tiny" if options.tiny else "requests"))
        return
    begin = time.perf_counter()
    fetch(MODEL)
    run(prepared(options.tiny), options.seed, options.rates)
    print(f"\n{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
