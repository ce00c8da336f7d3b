"""The TRL side of policy_throughput.py; runs in an environment of its own. Prints what was measured as JSON."""

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """CPU-seconds of the training loop, and the largest memory above what was there before it."""

    def __init__(self):
        """Prepare to look at the memory."""
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    @staticmethod
    def now():
        """Bytes."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def look(self):
        """A hundred times a second."""
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.now())

    def on_train_begin(self, *args, **kwargs):
        """Start."""
        self.before = self.peak = self.now()
        self.thread.start()
        self.begin = time.process_time()

    def on_train_end(self, *args, **kwargs):
        """Stop."""
        self.end = time.process_time()
        self.done.set()


class TimedTrainer(GRPOTrainer):
    """Measures what makes and scores responses."""

    sampling, prompt_tokens, response_tokens, responses = 0.0, 0, 0, 0

    def _generate_and_score_completions(self, inputs):
        begin = time.process_time()
        found = super()._generate_and_score_completions(inputs)
        self.sampling += time.process_time() - begin
        self.prompt_tokens += int(found["prompt_mask"].sum()) // self.num_generations
        self.response_tokens += int(found["completion_mask"].sum())
        self.responses += len(found["completion_mask"])
        return found


def vowels(completions, **columns):
    """Share of vowels; policy_throughput.py has the same."""
    texts = [messages[0]["content"] for messages in completions]
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in texts]


def main(folder: str, sizes: dict[str, int], micro_batches: int) -> None:
    """Train one epoch."""
    torch.set_num_threads(1)
    set_seed(0)
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=sizes["per_step"] * sizes["responses"] // micro_batches,
            gradient_accumulation_steps=micro_batches,
            num_generations=sizes["responses"],
            max_completion_length=sizes["max_new_tokens"],
            loss_type="grpo",
            num_train_epochs=1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            reward_funcs=vowels,
            args=config,
            train_dataset=load_dataset("json", data_files=str(Path(folder) / "prompts.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[clock],
        )
        trainer.train()
    seconds = clock.end - clock.begin
    found = {
        "seconds": seconds,
        "sampling": trainer.sampling,
        "training": seconds - trainer.sampling,
        "memory": (clock.peak - clock.before) / 1e9,
        "steps": trainer.state.global_step,
        "prompt_tokens": trainer.prompt_tokens,
        "response_tokens": trainer.response_tokens,
        "responses": trainer.responses,
        "reward": statistics.mean(entry["reward"] for entry in trainer.state.log_history if "reward" in entry),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
