"""How fast the library is on this GPU, beside a bare loop and TRL, and whether `estimate` knows its memory.

    python -m benchmarks.gpu_check --out runs/gpu                       # about five minutes on one H100
    python -m benchmarks.gpu_check --out runs/gpu --sections dpo loss   # these alone
    python -m benchmarks.gpu_check --out runs/gpu --again               # what was measured, too
    python -m benchmarks.gpu_check --out runs/gpu --device cpu --tiny   # that it runs, not how fast

Sections, in order: LoRA on 8B with one document of 4096 tokens a row; where its time goes; LoRA on 1B with log-normal
documents; DPO on 1B with prompts twice as long as the responses; the loss over 128,256 entries; and other settings on
1B. Each run is a process of its own with a limit in seconds, and each section writes what it measured at once: a second
call goes on where the first one stopped. What a package lacks for is skipped and listed.

Rates count a document's tokens once, whatever is padded or computed for it. Hardware use (MFU) counts two operations a
weight forward, two for the gradients of activations, two for each trained weight, and causal attention, without what is
recomputed, over the maker's dense bfloat16 figure. TRL runs in this environment, if it has it, on the same weights and
records; only those of its settings count whose loss before training is ours to 1e-3.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import gpu_check_trl, gpu_runs
from benchmarks.gpu_runs import DpoRun, Found, LossRun, SftRun
from benchmarks.gpu_workloads import Place
from lit_alignment.callbacks.throughput import PEAK_FLOPS

GIB = 2**30
RECOMPUTED, ATTENTION_KEPT = {"gradient_checkpointing": "full"}, {"gradient_checkpointing": "selective"}


@dataclass(frozen=True)
class Run:
    """One row of a table.

    Args:
        name: Of the row.
        work: What is measured.
        needs: Packages without which it is skipped.
        limit: Seconds, with the start of its process.
    """

    name: str
    work: Callable[[Place], Found]
    needs: tuple[str, ...] = ()
    limit: int = 60


def documents(trainer: str, **backbone: str) -> SftRun:
    """LoRA on 1B with log-normal documents."""
    return SftRun("1b", trainer, "log-normal", backbone, pretrained=True)


SECTIONS: dict[str, list[Run]] = {
    "lora_8b": [
        Run("bare loop", SftRun("8b", "bare loop", backbone=RECOMPUTED)),
        Run("fit", SftRun("8b", backbone=RECOMPUTED)),
    ],
    "profile": [Run("bare loop", gpu_runs.profiled)],
    "lora_1b": [
        Run("bare loop", documents("bare loop"), limit=40),
        Run("fit", documents("fit"), limit=40),
        Run("TRL padded", gpu_check_trl.TrlSft(), ("trl",)),
        Run("TRL padded, Liger", gpu_check_trl.TrlSft(liger=True), ("trl", "liger_kernel")),
        Run("TRL packed", gpu_check_trl.TrlSft(packing=True), ("trl",)),
    ],
    "dpo": [
        Run("fit", DpoRun(True), limit=40),
        Run("fit, prompts not shared", DpoRun(False), limit=40),
        Run("TRL", gpu_check_trl.dpo, ("trl",)),
    ],
    "loss": [
        Run(f"{form}, {'trained' if trained else 'frozen'} head", LossRun(form, trained), limit=30)
        for trained in (False, True)
        for form in ("chunks", "full logits")
    ],
    "other": [
        Run("8B, nothing recomputed", SftRun("8b")),
        Run("1B, nothing recomputed", SftRun("1b"), limit=30),
        Run("1B, all recomputed", SftRun("1b", backbone=RECOMPUTED), limit=30),
        Run("1B, all but attention recomputed", SftRun("1b", backbone=ATTENTION_KEPT), limit=30),
        Run("1B, log-normal, SDPA by document", documents("fit", attention="sdpa"), limit=40),
        Run("1B, compiled", SftRun("1b", backbone={"compile": True}), limit=60),
        Run("1B, Liger", SftRun("1b", backbone={"liger": True}), ("liger_kernel",), limit=30),
        Run("1B, 4 bits", SftRun("1b", backbone={"quantization": "nf4"}, pretrained=True), ("bitsandbytes",), limit=30),
        Run("1B, all weights", SftRun("1b", lora=False), limit=40),
        Run("1B, one document a row", SftRun("1b", documents="log-normal", packing=False), limit=30),
    ],
}


def measured(run: Run, place: Place) -> Found:
    """What a run measures in a process of its own, or why there is nothing."""
    lacking = [name for name in run.needs if importlib.util.find_spec(name) is None]
    if lacking:
        return {"skipped": f"{', '.join(lacking)} is not installed"}
    # A child of a process that has imported everything and has not touched the device starts at once.
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(run, place, its))
    child.start()
    its.close()
    begin = time.perf_counter()
    try:
        found = mine.recv() if mine.poll(run.limit) else {"failed": f"more than {run.limit} s"}
    except EOFError:
        found = {"failed": "its process died"}
    child.kill()
    child.join()
    return found | {"wall": time.perf_counter() - begin}


def _send(run: Run, place: Place, pipe: Any) -> None:
    try:
        found = run.work(place)
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    pipe.send(found)


# Tables.


def rate(found: Found, of: str = "tokens") -> float:
    """Of tokens or pairs, a second."""
    return float(sum(found[of]) / sum(found["seconds"]))


def rows_of(section: str, results: dict[str, Found], peak: float | None) -> list[str]:
    """A table in Markdown.

    Args:
        section: Which.
        results: What its runs measured.
        peak: Operations a second of the device in bfloat16.
    """
    good = {name: found for name, found in results.items() if "seconds" in found or "shares" in found}
    lines = [f"\n## {section}\n"]
    if section == "profile":
        for found in good.values():
            parts = found["shares"] | {"the loss's forward pass, of all": found["of_the_loss"], "gaps": found["gaps"]}
            lines += ["| part of the device's time | share |", "|---|---|"]
            lines += [f"| {kind} | {share:.1%} |" for kind, share in [*parts.items(), *found["top"].items()]]
    elif section == "loss":
        lines += ["| loss | ms | added peak, GiB | value |", "|---|---|---|---|"]
        for name, found in good.items():
            milliseconds = 1000 * statistics.median(found["seconds"])
            lines.append(f"| {name} | {milliseconds:.1f} | {found['added'] / GIB:.2f} | {found['loss']:.1f} |")
    else:
        unit = "pairs" if section == "dpo" else "tokens"
        lines += [f"| run | {unit}/s | MFU | peak, GiB | estimate, GiB | first loss |", "|---|---|---|---|---|---|"]
        for name, found in good.items():
            speed = rate(found, unit)
            flops = found.get("flops_per_token")
            use = "-" if peak is None or flops is None else f"{speed * flops / peak:.1%}"
            said = f"{found['estimate'] / GIB:.2f}" if "estimate" in found else "-"
            loss = f"{found['first_loss']:.4f}" if "first_loss" in found else "-"
            lines.append(f"| {name} | {speed:,.1f} | {use} | {found['peak'] / GIB:.2f} | {said} | {loss} |")
        lines += ratios(good, unit)
    lines += [f"\n{name}: skipped, {found['skipped']}" for name, found in results.items() if "skipped" in found]
    return lines + [f"\n{name}: FAILED, {found['failed']}" for name, found in results.items() if "failed" in found]


def ratios(good: dict[str, Found], unit: str) -> list[str]:
    """How `fit` compares with the bare loop, and with TRL's fastest run of equal loss."""
    if "fit" not in good:
        return []
    ours, lines = rate(good["fit"], unit), []
    if "bare loop" in good:
        lines.append(f"\nfit over the bare loop: {ours / rate(good['bare loop'], unit):.3f}")
    theirs = {name: found for name, found in good.items() if name.startswith("TRL")}
    first = good["fit"].get("first_loss")
    sound = {name: rate(found, unit) for name, found in theirs.items() if abs(found["first_loss"] - first) <= 1e-3}
    if sound:
        best = max(sound, key=lambda name: sound[name])
        lines.append(f"\nfit over {best}: {ours / sound[best]:.2f}")
    elif theirs:
        lines.append("\nno run of TRL has our first loss")
    return lines


def main() -> None:
    """Run what was not measured yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and table.md")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows")
    parser.add_argument("--seconds", type=int, default=420, help="begin no run after these")
    parser.add_argument("--again", action="store_true", help="measure these sections again")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    place = Place(options.out / "shared", torch.device(options.device), options.tiny)
    stored, begin = options.out / "results.json", time.perf_counter()
    results: dict[str, dict[str, Found]] = json.loads(stored.read_text()) if stored.is_file() else {}
    for section in options.sections:
        done = {} if options.again else {n: f for n, f in results.get(section, {}).items() if "failed" not in f}
        for run in SECTIONS[section]:
            if run.name in done or time.perf_counter() - begin > options.seconds:
                continue
            done[run.name] = measured(run, place)
            results[section] = done
            stored.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{section}, {run.name}: {done[run.name].get('wall', 0):.0f} s", flush=True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"# {name}, {versions}, {time.perf_counter() - begin:.0f} s"]
    for section, found in results.items():
        lines += rows_of(section, found, peak)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
