"""The TRL side of preference_throughput.py; runs in an environment of its own. Prints what was measured as JSON."""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer


class Clock(TrainerCallback):
    """CPU-seconds of the training loop, and the largest memory above what was there before it."""

    def __init__(self):
        """Begin to look at the memory."""
        self.before = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        self.created = time.process_time()

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
        self.begin = time.process_time()

    def on_train_end(self, *args, **kwargs):
        """Stop."""
        self.end = time.process_time()
        self.done.set()


def main(folder: str, form: str, batch_size: int, max_length: int) -> None:
    """Train one epoch with a reference beside or precomputed."""
    torch.set_num_threads(1)
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(
            output_dir=out,
            per_device_train_batch_size=batch_size,
            max_length=max_length,
            precompute_ref_log_probs=form == "TRL precomputed",
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
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=load_dataset("json", data_files=str(Path(folder) / "pairs.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[clock],
        )
        trainer.train()
    found = {
        "seconds": clock.end - clock.begin,
        "with_pass": clock.end - clock.created,
        "memory": (clock.peak - clock.before) / 1e9,
        "steps": trainer.state.global_step,
        "loss": trainer.state.log_history[0]["loss"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
