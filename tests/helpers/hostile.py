"""Checkpoints and folders that try to run code, or to reach files outside of themselves, when they are loaded."""

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save

from lit_alignment.checkpoints.sharded import partial_path, put_in_place


class Payload:
    """What makes a marker file where plain pickle loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return open, (str(self.marker), "w")  # type: ignore[return-value]


def _sharded(path: Path, content: dict[str, Any], optimizer: Any = None) -> Path:
    """A checkpoint in shards of another's content."""
    unfinished = partial_path(path)
    rest = {key: value for key, value in content.items() if key not in ("state_dict", "optimizer_states")}
    groups: list[dict[str, Any]] = [{"params": ["x"], "lr": 0.1}]
    state = {"state": {"x": {"exp_avg": torch.ones(3)}}, "param_groups": groups}
    shards = {"state_dict": content["state_dict"], "optimizer_0": state if optimizer is None else optimizer}
    save(shards, checkpoint_id=unfinished, no_dist=True)
    put_in_place(unfinished, path, rest)
    return path


def _file(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def _edited(path: Path, edit: Callable[[Any], Any]) -> Path:
    """A sharded checkpoint whose description is another."""
    with (path / ".metadata").open("rb") as file:
        found = pickle.load(file)
    (path / ".metadata").write_bytes(pickle.dumps(edit(found)))
    return path


def _planned(where: Any, found: Any) -> Any:
    """A description by which each value belongs somewhere else."""
    found.planner_data = dict.fromkeys(found.planner_data, ("optimizer_0", where))
    return found


def _elsewhere(path: Path, content: dict[str, Any], name: str) -> Path:
    """A sharded checkpoint whose shard lies outside of its folder."""
    _sharded(path, content)
    shard = next(path.glob("*.distcp"))
    shutil.copy(shard, path.parent / "outside.distcp")

    def edit(found: Any) -> Any:
        for place in found.storage_data.values():
            place.relative_path = name
        return found

    return _edited(path, edit)


def deepspeed_folder(path: Path, tag: str = "checkpoint", **content: Any) -> Path:
    """A folder that looks like one of DeepSpeed's."""
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text(tag)
    torch.save({"module": {}, **content}, path / "checkpoint/mp_rank_00_model_states.pt")
    state = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": []}
    torch.save(
        {"optimizer_state_dict": state, **content}, path / "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    return path


def hostile_checkpoints(folder: Path, content: dict[str, Any], marker: Path) -> dict[str, Path]:
    """Checkpoints by what they try.

    Args:
        folder: Where they are written.
        content: Of a good checkpoint.
        marker: The file that is made if one of them succeeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    payload = Payload(marker)
    about = content["lit_alignment"]
    found = {
        "a Python object in the file": _file(folder / "object.ckpt", content | {"epoch": payload}),
        "a Python object as a weight": _file(folder / "weight.ckpt", content | {"state_dict": {"model.x": payload}}),
        "a plain pickle": folder / "pickle.ckpt",
        "a Python object as the description of shards": _sharded(folder / "described.ckpt", content),
        "a Python object in the description of shards": _sharded(folder / "value.ckpt", content),
        "a Python object in a shard": _sharded(folder / "shard.ckpt", content, {"state": {}, "evil": payload}),
        "a Python object beside the shards": _sharded(folder / "beside.ckpt", content),
        "a shard above the folder": _elsewhere(folder / "above.ckpt", content, "../outside.distcp"),
        "a shard by its absolute name": _elsewhere(
            folder / "absolute.ckpt", content, str(folder.absolute() / "outside.distcp")
        ),
        "a shard behind a link": _elsewhere(folder / "linked.ckpt", content, "link.distcp"),
        "a list of a billion values": _edited(_sharded(folder / "long.ckpt", content), partial(_planned, 10**9)),
        "a Python object in DeepSpeed's part": deepspeed_folder(folder / "deepspeed.ckpt", evil=payload),
        "DeepSpeed's part elsewhere": deepspeed_folder(folder / "tag.ckpt", tag="../outside"),
    }
    found["a plain pickle"].write_bytes(pickle.dumps(content | {"epoch": payload}))
    (found["a Python object as the description of shards"] / ".metadata").write_bytes(pickle.dumps(payload))
    described = found["a Python object in the description of shards"]
    _edited(described, partial(_planned, payload))
    torch.save({"global_step": payload, "lit_alignment": about}, found["a Python object beside the shards"] / "meta.pt")
    (found["a shard behind a link"] / "link.distcp").symlink_to(folder.absolute() / "outside.distcp")
    return found


def model_with_code(folder: Path, base: str, marker: Path) -> Path:
    """A model folder with Python code, which its configuration asks to run."""
    shutil.copytree(base, folder)
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
    code += "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
    (folder / "evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hostile_adapters(folder: Path, base: str, marker: Path) -> dict[str, Path]:
    """Adapter folders by what they try.

    Args:
        folder: Where they are written.
        base: Their base model.
        marker: The file that is made if one of them succeeds.
    """
    module = folder / "evil_megatron.py"
    folder.mkdir(parents=True, exist_ok=True)
    module.write_text(f"open({str(marker)!r}, 'w').close()\n")
    with_code = model_with_code(folder / "with_code", base, marker)
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    settings = {
        "pickled": lora,
        "megatron": lora | {"megatron_config": {"x": 1}, "megatron_core": "evil_megatron"},
        "experts": {"peft_type": "XLORA", "adapters": {"a": str(folder)}, "task_type": "CAUSAL_LM"},
        "tokenizer": prompt
        | {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "inference_mode": False}
        | {"tokenizer_name_or_path": str(with_code), "tokenizer_kwargs": {"trust_remote_code": True}},
        "unknown": {"peft_type": "EVIL"},
        "base": lora | {"base_model_name_or_path": str(with_code)},
    }
    found = {}
    for name, values in settings.items():
        own = found[name] = folder / name
        own.mkdir()
        (own / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, **values}))
        if name == "pickled":
            torch.save({"x": Payload(marker)}, own / "adapter_model.bin")
        else:
            save_file({"x": torch.ones(1)}, own / "adapter_model.safetensors")
    return found
