"""Speed and memory of a step of GRPO with transformers' own generate: our `fit`, and TRL's GRPOTrainer.

    python -m benchmarks.policy_throughput --trl-python PATH/TO/TRL/ENV/bin/python
    python -m benchmarks.policy_throughput --trl-python PATH/TO/TRL/ENV/bin/python --tiny    # one short step, once

The workload is that of benchmarks/preference_throughput.py: a random Llama of 13.2M parameters with 32,768 entries,
prompts of about 128 tokens, float32, AdamW, one thread. Each step samples eight responses to eight prompts, all 64
together, at temperature 1 and up to 64 tokens, scores them by their share of vowels, and trains on them, in two
micro-batches or in eight. No reference, no clipping of gradients. Each run is a process of its own, all forms in turn,
five times; shown are medians. Rates count each prompt once and all responses, over CPU-seconds of the training loop;
sampling is what makes and scores responses, training all else. Peak memory is the process's, less what it had before
the training began. TRL runs in an environment of its own (`pip install torch==2.13.0 trl==1.16.0`).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.preference_throughput import MAX_LENGTH, OPTIMIZER, Memory, make_workload, process
from benchmarks.stages import read, write
from lit_alignment import PolicyDataModule, PolicyModule, RolloutConfig
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.rollout import Group
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.rollout import RewardFunction
from lit_alignment.rollout.samplers import TransformersSampler

ROUNDS = 5
SIZES = {"prompts": 48, "per_step": 8, "responses": 8, "max_new_tokens": 64}
TINY = {"prompts": 8, "per_step": 8, "responses": 8, "max_new_tokens": 8}
MICRO_BATCHES = (2, 8)  # of a step


@dataclass(kw_only=True, eq=False)
class Vowels(RewardFunction):
    """Share of vowels; policy_trl.py has the same."""

    inline: ClassVar[bool] = True

    def __call__(self, responses: list[str], record: dict[str, Any]) -> list[float]:
        """From 0 to 1."""
        return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in responses]


class Clock(Callback):
    """CPU-seconds of a training and of its rollouts, and the tokens of these.

    Args:
        module: Whose rollouts are timed.
    """

    def __init__(self, module: PolicyModule) -> None:
        """Put a clock around what makes rollouts."""
        self.roll_out = module.roll_out
        module.roll_out = self.timed

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin."""
        self.memory, self.begin = Memory(), time.process_time()
        self.sampling, self.prompt_tokens, self.lengths, self.rewards = 0.0, 0, [], []

    def timed(self, *arguments: Any) -> list[Group]:
        """A rollout."""
        begin = time.process_time()
        groups = self.roll_out(*arguments)
        self.sampling += time.process_time() - begin
        self.prompt_tokens += sum(len(group.prompt) for group in groups)
        answers = [answer for group in groups for answer in group.answers]
        self.lengths += [len(answer.token_ids) for answer in answers]
        self.rewards += [answer.reward for answer in answers]
        return groups

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """End."""
        seconds = time.process_time() - self.begin
        self.found = {"seconds": seconds, "sampling": self.sampling, "training": seconds - self.sampling}
        self.found |= {"memory": self.memory.grown(), "steps": trainer.global_step}
        self.found |= {"prompt_tokens": self.prompt_tokens, "response_tokens": sum(self.lengths)}
        self.found |= {"responses": len(self.lengths), "reward": statistics.mean(self.rewards)}


def run_ours(folder: Path, sizes: dict[str, int], micro_batches: int) -> dict[str, Any]:
    """Train with the library."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    together = sizes["per_step"] * sizes["responses"]
    module = PolicyModule(
        BackboneConfig(str(folder)),
        rewards=[Vowels()],
        optimizer=OPTIMIZER,
        rollout=RolloutConfig(sizes["responses"], sizes["max_new_tokens"]),
        engine=TransformersSampler(together),
    )
    clock = Clock(module)
    with tempfile.TemporaryDirectory() as cache:
        data = PolicyDataModule(
            module.tokenizer,
            train=[SourceConfig(str(folder / "prompts.jsonl"))],
            encoding=EncodingConfig(max_length=MAX_LENGTH),
            batch_size=sizes["per_step"] // micro_batches,
            cache_dir=cache,
        )
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_val_batches=0,
            accumulate_grad_batches=micro_batches,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            callbacks=[clock],
            **quiet,
        ).fit(module, data)
    return clock.found


def check(runs: dict[str, list[dict[str, Any]]], sizes: dict[str, int]) -> None:
    """End if a run has not done the work of the others."""
    for form, found in runs.items():
        for each in found:
            expected = {
                "steps": sizes["prompts"] // sizes["per_step"],
                "responses": sizes["prompts"] * sizes["responses"],
            }
            wrong = {key: each[key] for key, value in expected.items() if each[key] != value}
            if wrong or each["response_tokens"] < 0.95 * each["responses"] * sizes["max_new_tokens"]:
                raise SystemExit(f"{form}: {each}, not {expected} with responses of {sizes['max_new_tokens']} tokens")


def print_tables(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Rates, seconds and memory of all forms, and how the two libraries compare.

    Args:
        runs: What each round measured, by form.
    """

    def median(form: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[form])

    def seconds_of_token(run: dict[str, Any], key: str) -> float:
        return float(run[key] / (run["prompt_tokens"] + run["response_tokens"]))

    print(
        "| run | micro-batches a step | tokens/CPU-s | of training alone | CPU-s a step | sampling | training |", end=""
    )
    print(" peak memory, GB | tokens a response | mean reward |\n|---|---|---|---|---|---|---|---|---|---|")
    for form in runs:
        rates = [statistics.median(1 / seconds_of_token(r, key) for r in runs[form]) for key in ("seconds", "training")]
        parts = [median(form, key) / median(form, "steps") for key in ("seconds", "sampling", "training")]
        cells = [
            *(f"{rate:.0f}" for rate in rates),
            *(f"{part:.2f}" for part in parts),
            f"{median(form, 'memory'):.2f}",
        ]
        length = median(form, "response_tokens") / median(form, "responses")
        print(f"| {' | '.join([*form.split(), *cells])} | {length:.1f} | {median(form, 'reward'):.3f} |")
    print()
    for number in MICRO_BATCHES:
        ours, theirs = runs[f"fit {number}"], runs.get(f"TRL {number}")
        if theirs is None:
            continue
        for key, what in (("seconds", "a whole step"), ("training", "its training half")):
            ratios = [
                seconds_of_token(second, key) / seconds_of_token(first, key)
                for first, second in zip(ours, theirs, strict=True)
            ]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"- {number} micro-batches a step: speed of {what} over TRL's: {spread}")


def main() -> None:
    """Run all forms in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of an environment with trl; TRL is left out without it")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    parser.add_argument("--tiny", action="store_true", help="one short step, once")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, sizes, number = options.worker
        print(json.dumps(run_ours(Path(folder), json.loads(sizes), int(number))))
        return
    sizes = TINY if options.tiny else SIZES
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workload(folder, options.layers)
        prompts = [{"prompt": pair["prompt"]} for pair in read(folder / "pairs.jsonl")[: sizes["prompts"]]]
        write(folder / "prompts.jsonl", prompts)
        commands = {"fit": [sys.executable, "-m", "benchmarks.policy_throughput", "--worker"]}
        if options.trl_python:
            commands["TRL"] = [options.trl_python, str(Path(__file__).with_name("policy_trl.py"))]
        for number in range(options.rounds or (1 if options.tiny else ROUNDS)):
            for micro_batches in MICRO_BATCHES:
                for library, command in commands.items():
                    found = process([*command, name, json.dumps(sizes), str(micro_batches)])
                    runs.setdefault(f"{library} {micro_batches}", []).append(found)
                    print(f"round {number + 1}: {library} {micro_batches}: {found}", file=sys.stderr, flush=True)
    check(runs, sizes)
    print_tables(runs)


if __name__ == "__main__":
    main()
