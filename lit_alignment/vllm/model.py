"""A trained model in the form in which vLLM loads it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lit_alignment.checkpoints.export import ExportConfig, export
from lit_alignment.checkpoints.saved import Saved, read_saved
from lit_alignment.errors import ConfigError
from lit_alignment.paths import cache_dir, local_path


@dataclass(frozen=True)
class Served:
    """What vLLM is given.

    Args:
        folder: A full model, or the base of an adapter.
        adapter: Folder of a LoRA adapter.
        revision: Branch, tag or commit of a base on the hub.
    """

    folder: str
    adapter: str | None = None
    revision: str | None = None

    @property
    def trained_folder(self) -> Path:
        """The folder that training has made: with tokenizer, template and stop ids."""
        return Path(self.adapter or self.folder)

    def settings(self) -> dict[str, Any]:
        """What vLLM's engine must be told of it."""
        found: dict[str, Any] = {"model": self.folder, "revision": self.revision}
        if self.adapter is not None:
            found |= {"enable_lora": True, "max_lora_rank": lora_rank(self.adapter), "max_loras": 1}
        return found


def served_model(source: Path, trust_remote_code: bool = False) -> Served:
    """A folder that vLLM loads, made from a checkpoint once and kept in the cache.

    Args:
        source: A folder of a full model, as it stands; or a checkpoint, a sharded one, or an adapter folder.
        trust_remote_code: Run code that comes with its base.

    Raises:
        CheckpointError: If it is none of these, or its export answers differently.
        ConfigError: If vLLM cannot serve it.
    """
    if (source / "config.json").is_file() and not (source / "adapter_config.json").is_file():
        return Served(str(source))
    saved = read_saved(source)
    _refuse(saved, source)
    folder = cache_dir() / "served" / f"{source.stem}-{_fingerprint(source)}"
    if not folder.exists():
        print(f"exporting {source} for vLLM, once", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(ExportConfig(source, folder, trust_remote_code=trust_remote_code))
    if (folder / "adapter_config.json").is_file():
        print(f"LoRA adapter beside its base {saved.backbone.path}")
        return Served(local_path(saved.backbone.path), str(folder), saved.backbone.revision)
    return Served(str(folder))


def _refuse(saved: Saved, source: Path) -> None:
    peft = saved.peft
    if saved.adapter is not None:
        peft = saved.adapter.peft()
    if peft is not None and peft.is_prompt_learning:
        raise ConfigError(
            f"{source}: {type(peft).__name__} puts virtual tokens before the prompt, which vLLM does not. "
            "Use engine: transformers."
        )


def _fingerprint(source: Path) -> str:
    """Changes when a checkpoint is written anew."""
    names = ("adapter_model.safetensors", ".metadata", "latest")
    file = source if source.is_file() else next(source / name for name in names if (source / name).is_file())
    status = file.stat()
    return hashlib.sha256(f"{file.resolve()}/{status.st_mtime_ns}/{status.st_size}".encode()).hexdigest()[:16]


def lora_rank(adapter: str) -> int:
    """The smallest of vLLM's ranks in which an adapter has room.

    Raises:
        ConfigError: If there is none.
    """
    from vllm.config.lora import MaxLoRARanks

    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    found = min((each for each in get_args(MaxLoRARanks) if each >= rank), default=None)
    if found is None:
        raise ConfigError(f"{adapter}: LoRA of rank {rank} is more than vLLM takes. Merge it: lit-alignment merge.")
    return int(found)
