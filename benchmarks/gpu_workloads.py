"""Models, documents and pairs of gpu_check.py.

Models are random Llamas of real shapes in bfloat16; texts are words that are one token each.
"""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.sft_throughput import TEMPLATE

ROOT = Path(__file__).parent.parent
WARM = 3  # steps that are left out
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "1b": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "tiny": {},
}
PAIRS = 8  # of a step
DOCUMENTS = 6  # of log-normal lengths, which have about as many tokens as a packed row
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Place:
    """Where runs are made.

    Args:
        folder: What they share.
        device: Of the computation.
        tiny: Whether it is only to be seen that they run.
    """

    folder: Path
    device: torch.device
    tiny: bool

    @property
    def length(self) -> int:
        """Tokens of a packed row."""
        return 256 if self.tiny else 4096

    @property
    def steps(self) -> int:
        """Of a run, with those that are left out."""
        return WARM + (2 if self.tiny else 17)

    def model(self, shape: str) -> Path:
        """Folder with the configuration of a shape, and a tokenizer."""
        name = "tiny" if self.tiny else shape
        folder = self.folder / f"model-{name}"
        if not folder.is_dir():
            settings = SHAPES[name] | {"max_position_embeddings": 2 * self.length}
            AutoConfig.from_pretrained(ROOT / "configs/tiny", **settings).save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
        return folder

    def weights(self, shape: str) -> Path:
        """The same folder with weights, for those that share them."""
        folder = self.model(shape)
        if not (folder / "model.safetensors").is_file():
            torch.manual_seed(0)
            with self.device:
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
            model.save_pretrained(folder)
        return folder


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def lora() -> LoraConfig:
    """Adapters on all linear layers."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def write_documents(place: Place, kind: str) -> dict[str, Path]:
    """Conversations of words that are one token each: for all steps of a run, and some to validate on."""
    folder = place.folder / f"documents-{kind}"
    files = {name: folder / f"{name}.jsonl" for name in ("train", "val")}
    if folder.is_dir():
        return files
    folder.mkdir(parents=True)
    words, generator = one_token_words(), random.Random(0)
    for name, tokens in (("train", place.steps * place.length), ("val", 4 * place.length)):
        with files[name].open("w") as file:
            while tokens > 0:
                drawn = round(place.length / 10 * math.exp(generator.gauss(0, 1)))
                length = place.length if kind == "full" else min(place.length, max(32, drawn))
                tokens -= length
                texts = (" ".join(generator.choices(words, k=size)) for size in (length // 4, length))
                messages = [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=True)]
                file.write(json.dumps({"messages": messages}) + "\n")
    return files


def one_token_words() -> list[str]:
    """Words that are a token each, with the space before them."""
    vocabulary = AutoTokenizer.from_pretrained(ROOT / "configs/tiny").get_vocab()
    return [word[1:] for word in sorted(vocabulary) if word.startswith("Ġ") and word[1:].isalpha()]


def write_pairs(place: Place) -> Path:
    """Pairs with prompts of about a tenth of a row's tokens and responses of half of that."""
    path = place.folder / "pairs.jsonl"
    if path.is_file():
        return path
    words, generator = one_token_words(), random.Random(0)

    def message(role: str, tokens: int) -> list[dict[str, str]]:
        size = round(tokens * generator.uniform(0.8, 1.2))
        return [{"role": role, "content": " ".join(generator.choices(words, k=size))}]

    with path.open("w") as file:
        for _ in range(place.steps * PAIRS):
            pair = {name: message("assistant", place.length // 20) for name in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": message("user", place.length // 10), **pair}) + "\n")
    return path
