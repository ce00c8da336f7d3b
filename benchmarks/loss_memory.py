"""Time and added peak memory of the loss over a large vocabulary: ours against transformers' own.

    python benchmarks/loss_memory.py

2048 tokens of which 40 % are trained, 131,072 entries, width 256; forward and backward, float32; for next-token losses,
and for DPO on summed log-probabilities of sixteen responses. Each form runs in a process of its own, so that its peak
is its own; times are the best of three.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lit_alignment.losses import linear_cross_entropy, linear_logps

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


def dpo(logps: torch.Tensor) -> torch.Tensor:
    """DPO of eight pairs whose responses stand one behind the other, against a reference of 0."""
    sums = torch.stack([part.sum() for part in torch.tensor_split(logps, 16)])
    return -torch.nn.functional.logsigmoid(0.1 * (sums[::2] - sums[1::2])).mean()


def full_dpo(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits of all positions, and their log-softmax, as trainers on transformers do it."""
    logits = torch.nn.functional.linear(hidden[:-1], weight)
    trained = labels[1:] != -100
    logps = logits.log_softmax(-1).gather(1, labels[1:].clamp_min(0)[:, None])[:, 0]
    return dpo(logps[trained])


def our_dpo(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Responses only, in chunks whose logits are made again in the backward pass."""
    trained = labels[1:] != -100
    return dpo(linear_logps(hidden[:-1][trained], weight, labels[1:][trained]))


FORMS = {"transformers": transformers_loss, "ours": our_loss, "DPO, full logits": full_dpo, "our DPO": our_dpo}


def measure(form: str, rounds: int) -> None:
    """Print loss, seconds and added MB of one form."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[torch.rand(TOKENS) > SHARE] = -100
    loss_fn = FORMS[form]
    seconds = []
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is resident now
    before = peak_memory()
    for _ in range(rounds):
        hidden.grad = weight.grad = None
        begin = time.perf_counter()
        loss = loss_fn(hidden, weight, labels)
        loss.backward()
        seconds.append(time.perf_counter() - begin)
    print(float(loss.detach()), min(seconds), peak_memory() - before)


def main() -> None:
    """Run all forms and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", choices=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.form:
        measure(options.form, options.rounds)
        return
    rows = {}
    print("| form | loss | seconds | added peak MB |\n|---|---|---|---|")
    for name in FORMS:
        out = subprocess.check_output([sys.executable, __file__, "--form", name], text=True)
        loss, seconds, memory = rows[name] = tuple(map(float, out.split()))
        print(f"| {name} | {loss:.6f} | {seconds:.2f} | {memory:.0f} |")
    print()
    for full, ours in (("transformers", "ours"), ("DPO, full logits", "our DPO")):
        (_, slow, large), (_, fast, small) = rows[full], rows[ours]
        print(f"{ours} / {full}: time {fast / slow:.2f}, added peak memory {small / large:.3f}")


if __name__ == "__main__":
    main()
