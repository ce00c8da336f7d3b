"""Training speed of our `fit`, of a bare PyTorch loop, and of TRL's SFTTrainer on one workload.

    python benchmarks/sft_throughput.py --trl-python PATH/TO/TRL/ENV/bin/python

The workload: conversations of one to four exchanges whose lengths are log-normal, loss on the assistant; a random
Llama (9.4M parameters in the decoder, 49,152 entries), float32, AdamW, one epoch. The bare loop uses the same packed
batches, attention and loss as `fit`, and nothing of Lightning. TRL runs in an environment of its own
(`pip install torch==2.13.0 trl`), padded and packed, with as many tokens in a step. Rates count each conversation's
tokens once, whatever is padded or computed for it; the validation loss of each trained model is a mean over tokens,
computed by one function.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_alignment import SFTDataModule, SFTModule, Throughput
from lit_alignment.data.encode import EncodingConfig
from lit_alignment.data.messages import IGNORE_INDEX
from lit_alignment.data.records import Source
from lit_alignment.models.attention import document_arguments
from lit_alignment.models.head import head_loss, hidden_states
from lit_alignment.models.loading import Backbone, load_causal_model
from lit_alignment.optimization import OptimizerConfig, build_optimizer

ROOT = Path(__file__).parent.parent
MAX_LENGTH, TOKENS_PER_STEP = 1024, 2048
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
        train=[Source(str(folder / "train.jsonl"))],
        val=[Source(str(folder / "val.jsonl"))],
        encoding=EncodingConfig(max_length=MAX_LENGTH),
        tokens_per_batch=TOKENS_PER_STEP,
        cache_dir=str(folder / "cache"),
    )


class Clock(Callback):
    """Wall time from the first to the last training batch, all of Lightning's own work included."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start."""
        self.begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.begin


def run_fit(folder: Path) -> dict[str, float]:
    """Train with the library."""
    seed_everything(0, verbose=False)
    module = SFTModule(Backbone(str(folder)), optimizer=OPTIMIZER)
    data, clock = data_of(folder, module.tokenizer), Clock()
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    options |= {"limit_val_batches": 0, "use_distributed_sampler": False, "enable_model_summary": False}
    Trainer(**options, callbacks=[clock, Throughput()], enable_progress_bar=False).fit(module, data)
    return {
        "tokens": data.reports["train"].tokens,
        "seconds": clock.seconds,
        "val_loss": validation_loss(module.network, folder),
    }


def run_bare(folder: Path) -> dict[str, float]:
    """Train with a plain loop over the same packed batches."""
    seed_everything(0, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = data_of(folder, tokenizer)
    data.setup("fit")
    model = load_causal_model(Backbone(str(folder)), None, packing=True, device_type="cpu")
    loader = data.train_dataloader()
    optimizer, _ = build_optimizer(model.parameters(), OPTIMIZER, len(loader))
    begin = time.perf_counter()
    for batch in loader:
        arguments = document_arguments(model.config._attn_implementation, batch.document_lengths, torch.device("cpu"))
        hidden = hidden_states(model, input_ids=batch.input_ids, position_ids=batch.position_ids, **arguments)
        trained = batch.labels[:, 1:] != IGNORE_INDEX
        targets = batch.labels[:, 1:][trained]
        loss, _ = head_loss(model, hidden[:, :-1][trained], targets, None)
        (loss / len(targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    tokens = data.reports["train"].tokens
    return {"tokens": tokens, "seconds": seconds, "val_loss": validation_loss(model, folder)}


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


def run_trl(folder: Path, python: str, form: str, tokens: int, records: int) -> dict[str, float]:
    """Train with TRL in its own environment, and measure what it saved."""
    rows = MAX_LENGTH if form == "packed" else tokens / records
    out = folder / f"trl-{form}"
    script = str(Path(__file__).with_name("sft_throughput_trl.py"))
    arguments = [python, script, str(folder), str(out), form, str(round(TOKENS_PER_STEP / rows)), str(MAX_LENGTH)]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    model = AutoModelForCausalLM.from_pretrained(out)
    seconds = float(shown.strip().splitlines()[-1])
    return {"tokens": tokens, "seconds": seconds, "val_loss": validation_loss(model, folder)}


def in_own_process(folder: Path, form: str) -> dict[str, float]:
    """Run one of our forms where nothing is warm."""
    out = subprocess.check_output([sys.executable, __file__, "--folder", str(folder), "--form", form], text=True)
    return json.loads(out.strip().splitlines()[-1])


def main() -> None:
    """Run all forms in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of an environment with trl; TRL is left out without it")
    parser.add_argument("--records", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--form", choices=["fit", "bare"])
    options = parser.parse_args()
    if options.form:
        print(json.dumps({"fit": run_fit, "bare": run_bare}[options.form](options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workload(folder, options.records)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.repeats):  # in turn, so that a drift of the machine meets both alike
            for form in ("bare", "fit"):
                found.setdefault(form, []).append(in_own_process(folder, form))
                print(form, found[form][-1], file=sys.stderr, flush=True)
        tokens = int(found["fit"][0]["tokens"])
        for form in ("padded", "packed") if options.trl_python else ():
            result = run_trl(folder, options.trl_python, form, tokens, options.records)
            found[f"TRL {form}"] = [result]
            print(form, result, file=sys.stderr, flush=True)
    rates = {name: statistics.median(r["tokens"] / r["seconds"] for r in runs) for name, runs in found.items()}
    print(f"{options.records} conversations, {tokens} tokens\n\n| trainer | tokens/s | val loss |\n|---|---|---|")
    for name, runs in found.items():
        print(f"| {name} | {rates[name]:.0f} | {runs[0]['val_loss']:.4f} |")
    ratios = [f"{b['seconds'] / f['seconds']:.3f}" for b, f in zip(found["bare"], found["fit"], strict=True)]
    print(f"\nfit / bare, pair by pair: {', '.join(ratios)}")
    for name in [name for name in rates if name.startswith("TRL")]:
        print(f"fit / {name}: {rates['fit'] / rates[name]:.2f}")


if __name__ == "__main__":
    main()
