"""The TRL runs of gpu_check.py, on the same weights and records: SFTTrainer and DPOTrainer with adapters."""

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from benchmarks.gpu_runs import Found
from benchmarks.gpu_workloads import DOCUMENTS, PAIRS, WARM, Place, lora, now, write_documents, write_pairs
from lit_alignment.callbacks.throughput import peak_memory


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ends."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is noted yet."""
        self.device, self.ends = device, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step."""
        self.ends.append(now(self.device))

    def seconds(self) -> list[float]:
        """Of the steps that count."""
        return [after - before for before, after in pairwise(self.ends)][WARM - 1 :]


def common(place: Place) -> dict[str, Any]:
    """Settings of both trainers."""
    return {
        "bf16": True,
        "use_cpu": place.device.type == "cpu",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": place.steps,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def model_of(place: Place) -> Any:
    """The weights that our runs load, too."""
    return AutoModelForCausalLM.from_pretrained(place.weights("1b"), dtype=torch.bfloat16)


@dataclass(frozen=True)
class TrlSft:
    """SFTTrainer on the log-normal documents.

    Args:
        packing: Whether rows are packed; without FlashAttention its documents then see each other.
        liger: Whether Liger's kernels are used.
    """

    packing: bool = False
    liger: bool = False

    def __call__(self, place: Place) -> Found:
        """The loss before training, and how fast it is."""
        from trl import SFTConfig, SFTTrainer

        set_seed(0)
        files = {name: str(path) for name, path in write_documents(place, "log-normal").items()}
        records = load_dataset("json", data_files=files)
        tokenizer = AutoTokenizer.from_pretrained(place.model("1b"))
        clock = Clock(place.device)
        with tempfile.TemporaryDirectory() as out:
            config = SFTConfig(
                output_dir=out,
                per_device_train_batch_size=1 if self.packing else DOCUMENTS,
                per_device_eval_batch_size=len(records["val"]),
                max_length=place.length,
                packing=self.packing,
                assistant_only_loss=True,
                use_liger_kernel=self.liger,
                **common(place),
            )
            trainer = SFTTrainer(
                model=model_of(place),
                args=config,
                train_dataset=records["train"],
                eval_dataset=records["val"],
                processing_class=tokenizer,
                peft_config=lora(),
                callbacks=[clock],
            )
            first = trainer.evaluate()["eval_loss"]
            trainer.train()
        counts = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
        tokens = [after - before for before, after in pairwise(counts)][WARM - 1 :]
        found = {"seconds": clock.seconds(), "tokens": tokens, "first_loss": first}
        return found | {"peak": peak_memory(place.device)}


def dpo(place: Place) -> Found:
    """DPOTrainer on the pairs."""
    from trl import DPOConfig, DPOTrainer

    set_seed(0)
    clock = Clock(place.device)
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(output_dir=out, per_device_train_batch_size=PAIRS, max_length=place.length, **common(place))
        trainer = DPOTrainer(
            model=model_of(place),
            args=config,
            train_dataset=load_dataset("json", data_files=str(write_pairs(place)), split="train"),
            processing_class=AutoTokenizer.from_pretrained(place.model("1b")),
            peft_config=lora(),
            callbacks=[clock],
        )
        trainer.train()
    seconds = clock.seconds()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    found = {"seconds": seconds, "pairs": [PAIRS] * len(seconds), "first_loss": first}
    return found | {"peak": peak_memory(place.device)}
