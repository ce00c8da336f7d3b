"""Training speed of our `fit`, of a bare PyTorch loop, and of TRL's SFTTrainer on one workload.

    python benchmarks/sft_throughput.py --trl-python PATH/TO/TRL/ENV/bin/python

The workload: conversations of one to four exchanges whose lengths are log-normal, loss on the assistant; a random
Llama (9.4M parameters in the decoder, 49,152 entries), float32, AdamW, one epoch. The bare loop uses the same packed
batches, attention and loss as `fit`, and nothing of Lightning: after each of fit's steps it makes the same step with a
second model, so that a drift of the machine meets both alike, and each has its own clock. TRL runs in an environment of
its own (`pip install torch==2.13.0 trl`), padded and packed, with as many tokens in a step. Rates count each
conversation's tokens once, whatever is padded or computed for it; the validation loss of each trained model is a mean
over tokens, computed by one function.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_alignment import SFTDataModule, SFTModule, Throughput
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.encoding.messages import IGNORE_INDEX
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.attention import document_arguments
from lit_alignment.models.head import head_loss, hidden_states
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig, build_optimizer

ROOT = Path(__file__).parent.parent
MAX_LENGTH = TOKENS_PER_STEP = 2048
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_workload(folder: Path, number: int) -> None:
    """Write model, tokenizer, and training and validation conversations."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=320, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    generator = random.Random(0)
    words = (ROOT / "configs/sft/support/train.jsonl").read_text().split()[:4000]
    for name, count in (("train", number), ("val", 40)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                messages = []
                for _ in range(generator.randint(1, 4)):
                    for role, middle in (("user", 2.6), ("assistant", 3.2)):
                        length = min(200, max(1, round(math.exp(generator.gauss(middle, 0.9)))))
                        messages.append({"role": role, "content": " ".join(generator.choices(words, k=length))})
                file.write(json.dumps({"messages": messages}) + "\n")


def data_of(folder: Path, tokenizer: Any) -> SFTDataModule:
    """Packed training data."""
    return SFTDataModule(
        tokenizer,
        train=[SourceConfig(str(folder / "train.jsonl"))],
        val=[SourceConfig(str(folder / "val.jsonl"))],
        encoding=EncodingConfig(max_length=MAX_LENGTH),
        tokens_per_batch=TOKENS_PER_STEP,
        cache_dir=str(folder / "cache"),
    )


class BareLoop(Callback):
    """A plain PyTorch loop over the batches that `fit` trains on, one step after each of fit's, with separate clocks.

    Args:
        folder: Holds the same pretrained model.
    """

    def __init__(self, folder: Path) -> None:
        """Load the second model."""
        self.model = SFTModule(BackboneConfig(str(folder))).load_model(packing=True)
        self.fit_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start fit's clock: all of Lightning's work between two bare steps counts as fit's."""
        self.optimizer, _ = build_optimizer(
            self.model.named_parameters(), OPTIMIZER, trainer.estimated_stepping_batches
        )
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop fit's clock, make the bare step, and start fit's clock again."""
        begin = time.perf_counter()
        self.fit_seconds.append(begin - self.mark)
        self.step(batch)
        self.mark = time.perf_counter()
        self.bare_seconds.append(self.mark - begin)

    @torch.enable_grad()
    def step(self, batch: Any) -> None:
        """Forward, backward and update."""
        model = self.model
        arguments = document_arguments(model.config._attn_implementation, batch.document_lengths, torch.device("cpu"))
        hidden = hidden_states(model, input_ids=batch.input_ids, position_ids=batch.position_ids, **arguments)
        loss, _ = head_loss(model, hidden.flatten(0, 1).index_select(0, batch.read_at), batch.targets, None)
        (loss / len(batch.targets)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def run_ours(folder: Path) -> dict[str, dict[str, Any]]:
    """Train with the library and with the bare loop, step by step in turn."""
    seed_everything(0, verbose=False)
    module = SFTModule(BackboneConfig(str(folder)), optimizer=OPTIMIZER)
    data, bare = data_of(folder, module.tokenizer), BareLoop(folder)
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    options |= {"limit_val_batches": 0, "use_distributed_sampler": False, "enable_model_summary": False}
    # Last in the list: what the other callbacks do at the end of a step counts as fit's time.
    Trainer(**options, callbacks=[Throughput(), bare], enable_progress_bar=False).fit(module, data)
    found = {}
    for name, model, seconds in (
        ("fit", module.network, bare.fit_seconds),
        ("bare loop", bare.model, bare.bare_seconds),
    ):
        found[name] = {
            "tokens": data.reports["train"].tokens,
            "steps": len(seconds),
            "seconds": seconds,
            "val_loss": validation_loss(model, folder),
        }
    return found


@torch.no_grad()
def validation_loss(model: Any, folder: Path) -> float:
    """Mean loss over the trained tokens of the validation conversations, one conversation at a time."""
    data = data_of(folder, AutoTokenizer.from_pretrained(folder))
    data.setup("validate")
    model.eval()
    total, count = 0.0, 0
    for row in data.examples["val"]:
        labels = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        trained = labels != IGNORE_INDEX
        total += float(torch.nn.functional.cross_entropy(logits[trained], labels[trained], reduction="sum"))
        count += int(trained.sum())
    return total / count


def run_trl(folder: Path, python: str, form: str, tokens: int, records: int) -> dict[str, Any]:
    """Train with TRL in its own environment, and measure what it saved."""
    rows = MAX_LENGTH if form == "packed" else tokens / records
    out = folder / f"trl-{form}"
    script = str(Path(__file__).with_name("sft_throughput_trl.py"))
    arguments = [python, script, str(folder), str(out), form, str(round(TOKENS_PER_STEP / rows)), str(MAX_LENGTH)]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    seconds, steps = json.loads(shown.strip().splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(out)
    return {"tokens": tokens, "steps": steps, "seconds": [seconds], "val_loss": validation_loss(model, folder)}


def main() -> None:
    """Run all forms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of an environment with trl; TRL is left out without it")
    parser.add_argument("--records", type=int, default=48)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workload(folder, options.records)
        found = run_ours(folder)
        tokens = int(found["fit"]["tokens"])
        for form in ("padded", "packed") if options.trl_python else ():
            found[f"TRL {form}"] = run_trl(folder, options.trl_python, form, tokens, options.records)
    rates = {form: tokens / sum(run["seconds"]) for form, run in found.items()}
    print(f"{options.records} conversations, {tokens} tokens\n")
    print("| trainer | tokens/s | optimizer steps | val loss |\n|---|---|---|---|")
    for form, run in found.items():
        print(f"| {form} | {rates[form]:.0f} | {run['steps']} | {run['val_loss']:.4f} |")
    pairs = zip(found["bare loop"]["seconds"], found["fit"]["seconds"], strict=True)
    ratios = sorted(bare / fit for bare, fit in pairs)
    low, middle, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]
    print(f"\nfit / bare loop: {rates['fit'] / rates['bare loop']:.3f} in all; ", end="")
    print(f"step by step: median {middle:.3f}, middle half {low:.3f} to {high:.3f}")
    for form in [form for form in rates if form.startswith("TRL")]:
        print(f"fit / {form}: {rates['fit'] / rates[form]:.2f}")


if __name__ == "__main__":
    main()
