"""Does policy optimisation make a real model better, when it learns from rewards of what it samples in training?

    python -m benchmarks.policy requests --seed 0     # half an hour on one thread of two busy cores
    python -m benchmarks.policy requests --seed 0 --rates 1e-4 1e-3 --sft-rates 2e-4 2e-3   # others to choose from
    python -m benchmarks.policy chain_sum --seed 0
    python -m benchmarks.policy table                 # of all seeds that were run
    python -m benchmarks.policy requests --tiny       # every stage on a handful of records, in minutes

`requests`: SmolLM2-135M, fine-tuned on the demo's support requests as configs/sft/smollm2_lora.yaml says. GRPO goes on
with its adapter on the same 400 requests as configs/policy/support_smollm2.yaml says: eight responses to each request,
of which JsonEquality says whether they are right. Beside it is SFT for as many optimizer steps more. Exact match on 500
fresh requests whose sentences, products and order numbers are in no training data, and on 200 of the training requests.

`chain_sum`: the same model learns to add and subtract two to four numbers of one digit, a task of reasoning-gym: first
by SFT on a few questions, then by GRPO or more SFT on 400 others. Held out are 500 questions that are in neither.

The checkpoint of a run is the one with most right answers to 50 other prompts, and the learning rate of a method the
one with most of them over all seeds. A seed is that of the order of records and of sampling.

Every stage is a command of lit-alignment, run in this process. What a stage writes stands under data/policy_proof; a
stage whose settings and input files are those of the time before is passed over.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.stages import (
    BFLOAT16,
    EXPORT,
    LAST,
    NO_VALIDATION,
    Model,
    Record,
    callbacks,
    continued,
    fit,
    print_differences,
    read,
    sources,
    steps_of,
    write,
)
from benchmarks.support import CHOOSE, HELD_OUT, LONGEST_ROUTE, MODEL, SFT, answered, begun, write_requests
from lit_alignment.rollout import reasoning_gym_records
from lit_alignment.tools.fetch import fetch

DATA = Path("data/policy_proof")
GRPO = "configs/policy/support_smollm2.yaml"
RATE, SFT_RATE = 3e-4, 2e-4
STEPS_PER_CHECKPOINT = 10  # of the 50 optimizer steps of a run
TRAIN_ANSWERS = 200  # training prompts that are answered afterwards
CONTINUED = ("GRPO", "SFT continued")
TINY = 8  # prompts to choose on, and held out


@dataclass(frozen=True)
class Task:
    """What is learned. Its folder has `train.jsonl`, `choose.jsonl` and `held_out.jsonl`, chats with right answers.

    Args:
        folder: Of all that is written.
        start: The model that both methods continue; its export stands beside its checkpoint.
        reward: Class of the reward.
        longest: Tokens of an answer.
        tiny: Whether only every stage is to be seen.
    """

    folder: Path
    start: Model
    reward: str
    longest: int
    tiny: bool


# Tasks.


def requests(tiny: bool) -> Task:
    """Support requests."""
    folder = DATA / ("requests_tiny" if tiny else "requests")
    write_requests(folder, *((TINY, TINY) if tiny else (CHOOSE, HELD_OUT)))
    return Task(folder, begun(folder, tiny), "lit_alignment.rollout.JsonEquality", LONGEST_ROUTE, tiny)


QUESTIONS = {"begin": 100, "train": 400, "choose": CHOOSE, "held_out": HELD_OUT}
TERMS = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}
LONGEST_SUM = 6  # tokens; of -36 to 36, with the end of the turn


def chain_sum(tiny: bool) -> Task:
    """Sums of numbers of one digit."""
    folder = DATA / ("chain_sum_tiny" if tiny else "chain_sum")
    sizes = dict.fromkeys(QUESTIONS, 2 * TINY) if tiny else QUESTIONS
    questions = sums()
    for name, size in sizes.items():
        write(folder / f"{name}.jsonl", [next(questions) for _ in range(size)])
    begin = folder / "begin.jsonl"
    options = [f"--config={SFT}", *BFLOAT16, sources("train", begin), callbacks(LAST, EXPORT), *NO_VALIDATION]
    start = options, fit(folder / "sft", options, [begin])
    return Task(folder, start, "lit_alignment.rollout.ReasoningGymReward", LONGEST_SUM, tiny)


def sums() -> Iterator[Record]:
    """Different questions with their answers, as chats."""
    seen = set()
    for record in reasoning_gym_records("chain_sum", 20 * sum(QUESTIONS.values()), **TERMS):
        question = record["messages"][0]["content"]
        if question not in seen:
            seen.add(question)
            answer = {"role": "assistant", "content": record.pop("label")}
            yield record | {"messages": [*record["messages"], answer]}


# A seed.


def trained(task: Task, method: str, rate: float, seed: int) -> list[Model]:
    """Options and checkpoints of one training that continues the model; that of GRPO comes before that of SFT."""
    adapter, own, train = task.start[1].parent / "export", task.folder / f"seed-{seed}", task.folder / "train.jsonl"
    often = {"save_top_k": -1, "every_n_train_steps": 1 if task.tiny else STEPS_PER_CHECKPOINT}
    saving = LAST | {"init_args": often}
    config = GRPO if method == "GRPO" else SFT
    options = [*continued(config, adapter, rate, seed, saving), *BFLOAT16, sources("train", train)]
    if method == "GRPO":
        rollout = {"seed": seed, "max_new_tokens": task.longest}
        options += [f"--model.init_args.rollout.{name}={value}" for name, value in rollout.items()]
        options.append(f"--model.init_args.rewards={json.dumps([{'class_path': task.reward}])}")
    else:
        steps = max(steps_of(path) for path in own.glob("GRPO-*/run/checkpoints/*.ckpt"))
        options += [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
    folder = own / f"{method}-{rate:.0e}".replace(" ", "-")
    fit(folder, options, [adapter / "adapter_model.safetensors", train])
    checkpoints = sorted((folder / "run/checkpoints").glob("*.ckpt"), key=steps_of)
    return [(options, checkpoint) for checkpoint in checkpoints]


def measured(task: Task, method: str, rate: float, seed: int, models: list[Model]) -> None:
    """Choose a run's checkpoint, let it answer, and write how it does.

    Args:
        task: What is learned.
        method: Of the run.
        rate: Its learning rate.
        seed: Its seed.
        models: Its checkpoints, by step.
    """
    files = {name: task.folder / f"{name}.jsonl" for name in ("choose", "held_out", "train_answers")}
    write(files["train_answers"], read(task.folder / "train.jsonl")[:TRAIN_ANSWERS])
    name = f"{method}-{rate:.0e}-{seed}"
    shares = {}
    for model in models:
        step = steps_of(model[1])
        shares[step] = float(answered(task.folder, f"{name}-{step}", files["choose"], model, task.longest).mean())
    step = max(shares, key=lambda step: (shares[step], step))
    best = next(model for model in models if steps_of(model[1]) == step)
    hits = {
        split: answered(task.folder, name, files[split], best, task.longest) for split in ("train_answers", "held_out")
    }
    result = {"method": method, "rate": rate, "seed": seed, "step": step, "choose": shares}
    result |= {split: values.tolist() for split, values in hits.items()}
    write(task.folder / "results" / f"{name}.json".replace(" ", "-"), [result])
    means = ", ".join(f"{split} {values.mean():.3f}" for split, values in hits.items())
    print(f"{method}, {rate:g}, seed {seed}: step {step} of {shares}; {means}", flush=True)


def run(task: Task, seed: int, rates: dict[str, list[float]]) -> None:
    """Train and measure.

    Args:
        task: What is learned.
        seed: Of all trainings.
        rates: Learning rates of each method.
    """
    measured(task, "SFT", 0.0, 0, [task.start])
    for method in CONTINUED:
        for rate in rates[method]:
            measured(task, method, rate, seed, trained(task, method, rate, seed))
    table(task.folder)


# Tables.


def table(folder: Path) -> None:
    """Print how all seeds of a task do, and the differences between the rates that were chosen.

    Args:
        folder: Of the task.
    """
    results = [result for path in sorted((folder / "results").glob("*.json")) for result in read(path)]
    if {"SFT", *CONTINUED} - {result["method"] for result in results}:
        print(f"\n{folder.name}: no seed has been run to its end")
        return
    chosen = {"SFT": 0.0} | {method: chosen_rate(results, method) for method in CONTINUED}
    runs = {
        method: {each["seed"]: each for each in results if (each["method"], each["rate"]) == (method, rate)}
        for method, rate in chosen.items()
    }
    seeds = sorted(set.intersection(*(set(runs[method]) for method in CONTINUED)))
    print(f"\n{folder.name}, seeds {', '.join(map(str, seeds))}\n")
    print("| training | learning rate | seed | step | to choose on | training prompts | held out |")
    print("|---|---|---|---|---|---|---|")
    for each in sorted(results, key=lambda each: (each["method"], each["rate"], each["seed"])):
        rate, seed = (f"{each['rate']:g}", each["seed"]) if each["rate"] else ("-", "-")
        taken = " (chosen)" if each["rate"] and each["rate"] == chosen[each["method"]] else ""
        means = " | ".join(f"{np.mean(each[split]):.3f}" for split in ("train_answers", "held_out"))
        print(f"| {each['method']} | {rate}{taken} | {seed} | {each['step']} | {on_choose(each):.2f} | {means} |")
    runs["SFT"] = dict.fromkeys(seeds, runs["SFT"][0])
    for split, title in (("held_out", "held out"), ("train_answers", "training prompts")):
        hits = {method: np.array([own[seed][split] for seed in seeds]) for method, own in runs.items()}
        pairs = [("GRPO", "SFT continued"), ("GRPO", "SFT"), ("SFT continued", "SFT")]
        print_differences(f"difference on {hits['SFT'].shape[1]} {title}", hits, pairs)


def chosen_rate(results: list[Record], method: str) -> float:
    """The learning rate with most right answers to the prompts to choose on, of those that ran with most seeds."""
    shares: dict[float, list[float]] = {}
    for each in results:
        if each["method"] == method:
            shares.setdefault(float(each["rate"]), []).append(on_choose(each))
    most = max(map(len, shares.values()))
    return max((rate for rate, own in shares.items() if len(own) == most), key=lambda rate: np.mean(shares[rate]))


def on_choose(result: Record) -> float:
    """Share of right answers of a run's checkpoint to the prompts to choose on."""
    return float(max(result["choose"].values()))


def main() -> None:
    """Run one seed of a task, or print the tables."""
    tasks: dict[str, Callable[[bool], Task]] = {"requests": requests, "chain_sum": chain_sum}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*tasks, "table"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE], help="learning rates of GRPO")
    parser.add_argument("--sft-rates", type=float, nargs="+", default=[SFT_RATE], help="of SFT that goes on")
    parser.add_argument("--tiny", action="store_true", help="a handful of records, to see every stage run")
    options = parser.parse_args()
    if options.what == "table":
        for name in tasks:
            folder = DATA / (f"{name}_tiny" if options.tiny else name)
            if (folder / "results").is_dir():
                table(folder)
        return
    begin = time.perf_counter()
    fetch(MODEL)
    rates = dict(zip(CONTINUED, (options.rates, options.sft_rates), strict=True))
    run(tasks[options.what](options.tiny), options.seed, rates)
    print(f"\n{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
