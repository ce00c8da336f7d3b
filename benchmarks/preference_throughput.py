"""Training speed and memory of DPO: our `fit` with each kind of reference, a bare PyTorch loop, and TRL's DPOTrainer.

    python -m benchmarks.preference_throughput --trl-python PATH/TO/TRL/ENV/bin/python
    python -m benchmarks.preference_throughput --layers 24 --forms auto unshared

The workload: pairs with prompts of about 128 tokens and responses of about 64, a random Llama of 13.2M parameters with
as many entries as Mistral's, 32,768 (with 24 layers instead of 6, 27.7M), float32, AdamW, one thread, eight pairs a
step. Each run is a process of its own, all forms in turn, five times; shown are medians. Rates count each pair's prompt
once and both responses, whatever is padded or computed for them, over CPU-seconds of the training loop; "with its pass"
counts what computes a cached reference, too. Peak memory is the process's, less what it had before the training began.
The bare loop makes the step of fit after it, in the same process; what comes before fit's second step is not compared.
TRL runs in an environment of its own (`pip install torch==2.13.0 trl==1.16.0`).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_alignment import PreferenceDataModule, PreferenceModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.logprobs import target_logps
from lit_alignment.optimization import OptimizerConfig, build_optimizer

ROOT = Path(__file__).parent.parent
PAIRS, PER_STEP, ROUNDS, MAX_LENGTH = 48, 8, 5, 512
OPTIMIZER = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup=0)
OURS = ("auto", "frozen_copy", "unshared", "lora", "lora_cached", "bare")
PAGE = os.sysconf("SC_PAGE_SIZE")


def make_workload(folder: Path, layers: int) -> None:
    """Write model, tokenizer, and pairs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768, hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    tokenizer.save_pretrained(folder)
    generator = random.Random(0)
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 2]

    def text(tokens: int) -> str:
        found: list[str] = []
        while len(tokenizer(" ".join(found)).input_ids) < tokens + generator.randint(-4, 4):
            found += generator.choices(words, k=4)
        return " ".join(found)

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(PAIRS):
            prompt, responses = [{"role": "user", "content": text(120)}], {}
            for name in ("chosen", "rejected"):
                responses[name] = [{"role": "assistant", "content": text(62)}]
            file.write(json.dumps({"prompt": prompt, **responses}) + "\n")


class Memory(threading.Thread):
    """The largest resident memory of this process, above what it was at the start, in GB."""

    def __init__(self) -> None:
        """Begin to look."""
        super().__init__(daemon=True)
        self.before = self.peak = self.now()
        self.done = threading.Event()
        self.start()

    @staticmethod
    def now() -> int:
        """Bytes."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    def run(self) -> None:
        """Look a hundred times a second."""
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.now())

    def grown(self) -> float:
        """Stop, and say by how much it had grown at most."""
        self.done.set()
        self.join()
        return (self.peak - self.before) / 1e9


class Clock(Callback):
    """CPU-seconds of a training, with and without what comes before its first step; the first loss."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin, with the pass of a cached reference."""
        self.begin, self.memory = time.process_time(), Memory()
        self.first_loss: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin, without it."""
        self.trains = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the first loss."""
        self.first_loss = self.first_loss or float(outputs["loss"])

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """End."""
        end = time.process_time()
        self.found = {"with_pass": end - self.begin, "seconds": end - self.trains, "loss": self.first_loss}
        self.found["memory"] = self.memory.grown()


class BareLoop(Callback):
    """The same step with a second model and nothing of Lightning, after each of fit's, with clocks of their own.

    Args:
        folder: Holds the pretrained model.
    """

    def __init__(self, folder: Path) -> None:
        """Load the second model."""
        self.model = PreferenceModule(BackboneConfig(str(folder))).load_model(packing=True, shared_prompts=True)
        self.fit_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start fit's clock: all of Lightning's work between two bare steps counts as fit's."""
        self.optimizer, _ = build_optimizer(
            self.model.named_parameters(), OPTIMIZER, trainer.estimated_stepping_batches
        )
        self.mark = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop fit's clock, make the bare step, and start fit's clock again."""
        begin = time.process_time()
        self.fit_seconds.append(begin - self.mark)
        self.step(batch)
        self.mark = time.process_time()
        self.bare_seconds.append(self.mark - begin)

    @torch.enable_grad()
    def step(self, batch: Any) -> None:
        """Forward, backward and update."""
        logps = target_logps(self.model, batch)
        ratios = torch.stack([part.sum() for part in torch.split(logps - batch.reference, batch.lengths)])
        (-logsigmoid(0.1 * (ratios[batch.chosen] - ratios[batch.rejected])).mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def run_ours(folder: Path, form: str) -> dict[str, Any]:
    """Train with the library."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    lora = form.startswith("lora")
    reference: Any = {"frozen_copy": "frozen_copy", "lora_cached": "cached"}.get(form, "auto")
    peft = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    module = PreferenceModule(BackboneConfig(str(folder)), peft=peft, optimizer=OPTIMIZER, reference=reference)
    clock = Clock()
    with tempfile.TemporaryDirectory() as cache:
        data = PreferenceDataModule(
            module.tokenizer,
            train=[SourceConfig(str(folder / "pairs.jsonl"))],
            encoding=EncodingConfig(max_length=MAX_LENGTH),
            share_prompts=form != "unshared",
            tokens_per_batch=PER_STEP * (430 if form == "unshared" else 290),
            cache_dir=cache,
        )
        bare = BareLoop(folder) if form == "bare" else None
        options: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
        }
        options |= {"limit_val_batches": 0, "use_distributed_sampler": False, "enable_model_summary": False}
        callbacks = [clock, *([bare] if bare else [])]
        Trainer(**options, callbacks=callbacks, enable_progress_bar=False).fit(module, data)
        rows = data.examples["train"].rows(range(PAIRS))
    tokens = sum(len(row["prompt"]) + sum(map(len, row["responses"])) for row in rows)
    found = clock.found | {"tokens": tokens, "steps": data.plan("train").num_groups}
    if bare is not None:
        found["ratio"] = sum(bare.bare_seconds[1:]) / sum(bare.fit_seconds[1:])  # the first fit warms both up
    return found


def process(arguments: list[str]) -> dict[str, Any]:
    """What a run in a process of its own printed last."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run all forms in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of an environment with trl; TRL is left out without it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    parser.add_argument("--forms", nargs="+", choices=OURS, default=OURS, help="which of ours to run; auto is needed")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run_ours(Path(options.worker[0]), options.worker[1])))
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workload(folder, options.layers)
        trl = Path(__file__).with_name("preference_throughput_trl.py")
        forms = {
            form: [sys.executable, "-m", "benchmarks.preference_throughput", "--worker", name, form]
            for form in options.forms
        }
        if options.trl_python:
            for form in ("TRL live", "TRL precomputed"):
                forms[form] = [options.trl_python, str(trl), name, form, str(PER_STEP), str(MAX_LENGTH)]
        for number in range(options.rounds):
            for form, arguments in forms.items():
                runs.setdefault(form, []).append(process(arguments))
                print(f"round {number + 1}: {form}: {runs[form][-1]}", file=sys.stderr, flush=True)
    tokens = runs["auto"][0]["tokens"]

    def median(form: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[form])

    print("| run | tokens/CPU-s | with its pass | peak memory, GB | steps | first loss |\n|---|---|---|---|---|---|")
    for form in runs:
        rates = [tokens / median(form, key) for key in ("seconds", "with_pass")]
        rest = f"{median(form, 'memory'):.2f} | {runs[form][0]['steps']} | {median(form, 'loss'):.6f}"
        print(f"| {form} | {rates[0]:.0f} | {rates[1]:.0f} | {rest} |")

    def ratio(what: str, over: tuple[str, str], under: tuple[str, str]) -> None:
        """How many times less the first takes than the second, in the runs of each round."""
        found = [second[under[1]] / first[over[1]] for first, second in zip(runs[over[0]], runs[under[0]], strict=True)]
        print(f"- {what}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")

    print()
    if options.trl_python:
        live, before = ("TRL live", "seconds"), ("TRL precomputed", "seconds")
        ratio("auto with its pass, speed over TRL with a live reference", ("auto", "with_pass"), live)
        ratio("cached, speed over TRL precomputed, both without the pass", ("auto", "seconds"), before)
        ratio("peak memory of auto over TRL's with a live reference", ("TRL live", "memory"), ("auto", "memory"))
    for what, over, under in (
        ("time with shared prompts over without", "unshared", "auto"),
        ("time of a step, cached over a copy beside, full weights", "frozen_copy", "auto"),
        ("time of a step, cached over adapters off, LoRA", "lora", "lora_cached"),
    ):
        if {over, under} <= set(runs):
            ratio(what, (over, "seconds"), (under, "seconds"))
    if "bare" in runs:
        print(f"- fit's speed over a bare loop's: {median('bare', 'ratio'):.3f}")


if __name__ == "__main__":
    main()
