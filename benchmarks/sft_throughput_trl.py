"""The TRL side of sft_throughput.py; runs in an environment of its own. Prints seconds and steps."""

import json
import sys
import time
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Wall time of the training loop."""

    def on_train_begin(self, *args, **kwargs):
        """Start."""
        self.begin = time.perf_counter()

    def on_train_end(self, *args, **kwargs):
        """Stop."""
        self.seconds = time.perf_counter() - self.begin


def main(folder: str, out: str, form: str, batch_size: int, max_length: int) -> None:
    """Train one epoch, padded or packed."""
    set_seed(0)
    clock = Clock()
    config = SFTConfig(
        output_dir=out,
        per_device_train_batch_size=batch_size,
        max_length=max_length,
        packing=form == "packed",
        assistant_only_loss=True,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=load_dataset("json", data_files=str(Path(folder) / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(out)
    print(json.dumps([clock.seconds, trainer.state.global_step]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
