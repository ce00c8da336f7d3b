"""Time and added peak memory of the loss over a large vocabulary: ours against transformers' own.

    python benchmarks/loss_memory.py

2048 tokens of which 40 % are trained, 131,072 entries, width 256; forward and backward, float32. Each form runs in a
process of its own, so that its peak is its own; times are the best of three.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lit_alignment.losses import linear_cross_entropy

TOKENS, VOCABULARY, WIDTH, SHARE = 2048, 131_072, 256, 0.4


def peak_memory() -> int:
    """Highest resident memory since the last reset, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def transformers_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Full logits, then transformers' loss function with the count that its trainer passes."""
    logits = torch.nn.functional.linear(hidden[None], weight)
    return ForCausalLMLoss(logits, labels[None], VOCABULARY, num_items_in_batch=(labels[1:] != -100).sum())


def our_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Trained positions only, in chunks."""
    trained = labels[1:] != -100
    loss, _ = linear_cross_entropy(hidden[:-1][trained], weight, labels[1:][trained])
    return loss / trained.sum()


def measure(form: str) -> None:
    """Print loss, seconds and added MB of one form."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[torch.rand(TOKENS) > SHARE] = -100
    loss_fn = {"transformers": transformers_loss, "ours": our_loss}[form]
    seconds = []
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is resident now
    before = peak_memory()
    for _ in range(3):
        hidden.grad = weight.grad = None
        begin = time.perf_counter()
        loss = loss_fn(hidden, weight, labels)
        loss.backward()
        seconds.append(time.perf_counter() - begin)
    print(float(loss.detach()), min(seconds), peak_memory() - before)


def main() -> None:
    """Run both forms and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", choices=["transformers", "ours"])
    form = parser.parse_args().form
    if form:
        measure(form)
        return
    rows = {}
    for name in ("transformers", "ours"):
        out = subprocess.check_output([sys.executable, __file__, "--form", name], text=True)
        rows[name] = tuple(map(float, out.split()))
    print("| form | loss | seconds | added peak MB |\n|---|---|---|---|")
    for name, (loss, seconds, memory) in rows.items():
        print(f"| {name} | {loss:.6f} | {seconds:.2f} | {memory:.0f} |")
    (_, slow, large), (_, fast, small) = rows["transformers"], rows["ours"]
    print(f"\nours / transformers: time {fast / slow:.2f}, added peak memory {small / large:.3f}")


if __name__ == "__main__":
    main()
