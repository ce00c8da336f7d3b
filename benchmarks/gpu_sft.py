"""Speed, hardware use and memory of LoRA on one GPU, with `fit` and with a bare PyTorch loop.

    python benchmarks/gpu_sft.py --shape 8b
    python benchmarks/gpu_sft.py --shape 1b
    python benchmarks/gpu_sft.py --shape tiny --device cpu --steps 4      # that it runs, not how fast

A randomly initialised Llama of the given shape, bfloat16 weights under float32 adapters (rank 16 on all linear layers),
one packed row of 4096 tokens a step, loss on the assistant, activations recomputed. The bare loop has the same batches,
attention and loss, and nothing of Lightning. The first steps are left out. Hardware use (MFU) counts the operations of
the weights and of causal attention, without those that are recomputed, over the maker's dense bfloat16 figure.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer

from lit_alignment import SFTDataModule, SFTModule
from lit_alignment.callbacks.throughput import PEAK_FLOPS, peak_memory
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.attention import document_arguments
from lit_alignment.models.head import base_model, head_loss, hidden_states
from lit_alignment.models.loading import BackboneConfig, decoder_flops_per_token
from lit_alignment.optimization import OptimizerConfig, build_optimizer
from lit_alignment.planning.scaling import attention_flops_per_token

ROOT = Path(__file__).parent.parent
LENGTH = 4096
WARM = 3  # steps that are left out
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup=0)
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
    },
    "tiny": {},
}


class Clock(Callback):
    """Notes when each step of `fit` ends."""

    def __init__(self) -> None:
        """Nothing is noted yet."""
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Wait for the device, and note the time."""
        self.ends.append(now(pl_module.device))


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def build(folder: Path, shape: str, steps: int, length: int) -> tuple[SFTModule, SFTDataModule]:
    """Module and data of a shape; every conversation fills a row."""
    seed_everything(0, verbose=False)
    settings = SHAPES[shape] | {"max_position_embeddings": length}
    AutoConfig.from_pretrained(ROOT / "configs/tiny", **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "configs/tiny").save_pretrained(folder)
    module = SFTModule(
        BackboneConfig(str(folder), weights="random", dtype="bfloat16", gradient_checkpointing=True),
        peft=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer=OPTIMIZER,
    )
    words = "the kitchen scale does not work please reply order urgent " * (length // 8)
    messages = [{"role": "user", "content": words[:200]}, {"role": "assistant", "content": words}]
    data = SFTDataModule(
        module.tokenizer,
        train=[SourceConfig(records=[{"id": str(n), "messages": messages} for n in range(steps)])],
        encoding=EncodingConfig(max_length=length, truncation="keep_start", truncation_unit="tokens"),
        cache_dir=str(folder / "cache"),
    )
    return module, data


def run_fit(module: SFTModule, data: SFTDataModule, device: str) -> list[float]:
    """Seconds of each step of `fit`."""
    clock = Clock()
    Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, data)
    return [after - before for before, after in pairwise(clock.ends)]


def run_bare(module: SFTModule, data: SFTDataModule, device: torch.device) -> list[float]:
    """Seconds of each step of a plain loop."""
    model = module.load_model(device.type, packing=True).to(device)
    optimizer, _ = build_optimizer(model.named_parameters(), OPTIMIZER, 1e9)
    data.setup("fit")
    ends = []
    for batch in data.train_dataloader():
        implementation = base_model(model).config._attn_implementation
        arguments = document_arguments(implementation, batch.document_lengths, device)
        ids, positions, read_at, targets = (
            each.to(device) for each in (batch.input_ids, batch.position_ids, batch.read_at, batch.targets)
        )
        with torch.autocast(device.type, torch.bfloat16):
            hidden = hidden_states(model, input_ids=ids, position_ids=positions, **arguments)
            loss, _ = head_loss(model, hidden.flatten(0, 1).index_select(0, read_at), targets, None)
        (loss / len(targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(now(device))
    return [after - before for before, after in pairwise(ends)]


def flops_per_token(module: SFTModule, length: int) -> float:
    """Operations to train a token, in weights and attention."""
    parameters = list(module.network.parameters())
    config = base_model(module.network).config
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    width = config.num_attention_heads * config.head_dim
    return decoder_flops_per_token(config, sum(p.numel() for p in parameters), trainable) + attention_flops_per_token(
        config.num_hidden_layers, width, length
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=LENGTH)
    options = parser.parse_args()
    if options.steps < WARM + 1:
        parser.error(f"--steps {options.steps}: give {WARM + 1} or more")
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    print(f"{options.shape} on {name}, {options.length} tokens a step, torch {torch.__version__}\n")
    print("| trainer | tokens/s | TFLOP/s | MFU | peak memory, GiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for form in ("bare loop", "fit"):
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            module, data = build(Path(temporary), options.shape, options.steps, options.length)
            if form == "fit":
                seconds = run_fit(module, data, "gpu" if on_gpu else "cpu")[WARM - 1 :]
            else:
                data.prepare_data()
                seconds = run_bare(module, data, device)[WARM - 1 :]
            rate = options.length * len(seconds) / sum(seconds)
            flops = rate * flops_per_token(module, options.length)
            share = "-" if peak is None else f"{flops / peak:.1%}"
            memory = peak_memory(device) / 2**30
            print(f"| {form} | {rate:,.0f} | {flops / 1e12:.3g} | {share} | {memory:.1f} |", flush=True)
            del module, data


if __name__ == "__main__":
    main()
