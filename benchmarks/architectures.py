"""Which architectures train on packed rows exactly, and which are refused?

    python benchmarks/architectures.py                    # every causal architecture of transformers, minutes
    python benchmarks/architectures.py --only llama gpt2  # some

Each is built with random weights from a tiny configuration, in a process of its own, and loaded as a run would load it.
The loss of three documents of unequal lengths is computed in one packed row, in padded rows, and by transformers itself
with its eager attention, document by document. `exact`: all three agree. `padded`: packed rows are refused, and padded
ones agree. `refused`: both are. `LEAKS` and `WRONG`: a loss differs, and nothing was said. The exit code is 1 if there
is one of these. Architectures that no tiny configuration builds are listed at the end.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_alignment.data.batching.collate import TargetBatch, collate_packed, collate_padded
from lit_alignment.data.encoding.example import Example
from lit_alignment.errors import ConfigError
from lit_alignment.models.head import check_head, head_loss
from lit_alignment.models.isolation import check_isolation
from lit_alignment.models.loading import BackboneConfig, load_network
from lit_alignment.models.logprobs import hidden_at_targets

VOCABULARY, WIDTH, HEADS, LAYERS = 300, 64, 4, 2
LENGTHS = (5, 17, 9)
SECONDS = 120
TOLERANCE = 2e-5  # of a loss, relative
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim"), WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "n_shared_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **{"vocab_size": VOCABULARY, "head_dim": WIDTH // HEADS, "rotary_dim": 8, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "first_k_dense_replace": 1, "dropout": 0.0},
    "initializer_range": 0.2,  # so that what a token sees matters
    **{"image_size": 32, "patch_size": 16, "word_embed_proj_dim": WIDTH, "layerdrop": 0.0, "decoder_layerdrop": 0.0},
}


OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
}


def tiny(name: str) -> PretrainedConfig:
    """A small configuration of an architecture, with small parts."""
    return AutoConfig.for_model(name, **(_small(AutoConfig.for_model(name)) | OWN.get(name, {})))


def _small(config: PretrainedConfig) -> dict[str, Any]:
    known = config.to_dict()
    found = {key: value for key, value in SIZES.items() if key in known or key in config.attribute_map}
    if "qk_rope_head_dim" in known:  # latent attention has as many key heads as heads
        found |= {"num_key_value_heads": HEADS, "head_dim": known["qk_rope_head_dim"]}
    for key, part in vars(config).items():
        if isinstance(part, PretrainedConfig):
            found[key] = _small(part)
    return found


def documents() -> list[Example]:
    """Token ids, all of which but the first are trained."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Example(ids, [-100, *ids[1:]], [0.0] + [1.0] * (len(ids) - 1)) for ids in rows]


@torch.no_grad()
def our_loss(network: Any, batch: TargetBatch) -> float:
    """Mean over the trained tokens of a batch."""
    hidden = hidden_at_targets(network, batch, None)
    return float(head_loss(network, hidden, batch.targets, None)[0]) / len(batch.targets)


@torch.no_grad()
def their_loss(network: Any) -> float:
    """The same by transformers, document by document."""
    network.set_attn_implementation("eager")
    total, number = 0.0, 0
    for each in documents():
        ids = torch.tensor([each.input_ids])
        logits = network(input_ids=ids, use_cache=False).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        number += len(each.input_ids) - 1
    return total / number


def measure(name: str, folder: Path) -> dict[str, Any]:
    """What becomes of an architecture: losses, and messages of refusals, by form."""
    config = tiny(name)
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained("configs/tiny")
    tokenizer.save_pretrained(folder)
    found: dict[str, Any] = {}
    for form in ("packed", "padded"):
        torch.manual_seed(0)
        try:
            backbone = BackboneConfig(str(folder), weights="random")
            network = load_network(backbone, tokenizer, packing=form == "packed").eval()
            check_isolation(network, packing=form == "packed")
            check_head(network, torch.tensor([documents()[0].input_ids]))
        except ConfigError as error:
            found[form] = str(error)
            continue
        batch = collate_packed(documents(), 1.0) if form == "packed" else collate_padded(documents(), 0)
        found[form] = our_loss(network, batch)
        found["transformers"] = their_loss(network)
    return found


def in_a_process(name: str) -> dict[str, Any]:
    """`measure` in a child, whose crash is its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(name, Path(folder))
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    found: dict[str, Any] = json.loads(content) if content else {"error": "the process ended"}
    return found


def verdict(found: dict[str, Any]) -> tuple[str, str]:
    """A word for what was found, and why."""
    if "error" in found:
        return "not built", found["error"]
    packed, padded, own = (found.get(key) for key in ("packed", "padded", "transformers"))
    right = {
        form: isinstance(loss, str) or abs(loss - own) <= TOLERANCE * abs(own)
        for form, loss in (("packed", packed), ("padded", padded))
    }
    if not right["packed"]:
        return "LEAKS", f"packed {packed:.6f}, transformers {own:.6f}"
    if not right["padded"]:
        return "WRONG", f"padded {padded:.6f}, transformers {own:.6f}"
    if isinstance(padded, str):
        return "refused", padded
    if isinstance(packed, str):
        return "padded", packed
    return "exact", f"{packed:.6f}"


def main() -> int:
    """Print a line for each architecture, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="model types")
    names = parser.parse_args().only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    counts: Counter[str] = Counter()
    rest = []
    print("| architecture | | loss, or why |\n|---|---|---|")
    for name in names:
        word, why = verdict(in_a_process(name))
        counts[word] += 1
        if word == "not built":
            rest.append(f"{name} ({why.splitlines()[0][:90]})")
        else:
            print(f"| {name} | {word} | {why.splitlines()[0]} |", flush=True)
    print(f"\n{', '.join(f'{number} {word}' for word, number in sorted(counts.items()))}")
    if rest:
        print(f"\nNot built from a tiny configuration: {'; '.join(rest)}")
    return int(counts["LEAKS"] + counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
