"""The card of an exported model: README.md, as the Hugging Face hub reads it."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, try_to_load_from_cache
from peft import LoraConfig, PeftConfig

from lit_alignment.checkpoints.hf_folder import Written
from lit_alignment.checkpoints.saved import Saved
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.paths import local_path

FRONT = re.compile(r"---\n(.*?)\n---", re.DOTALL)
TASKS = {"scores": "text-classification", "media": "image-text-to-text"}
ASKING = {
    "scores": 'ClassificationModule.from_checkpoint("{0}").classify(["..."])',
    "media": 'VLMModule.from_checkpoint("{0}").chat([{{"role": "user", "content": "..."}}])',
    "text": 'SFTModule.from_checkpoint("{0}").chat("...")',
}
REWARD = 'RewardModule.from_checkpoint("{0}").score([[{{"role": "user", "content": "..."}}, ...]])'


def model_card(saved: Saved, form: Written, name: str, composed: bool = False) -> str:
    """Data, settings and figures of a training, and how to use what is exported, in Markdown with a front matter.

    No path of the machine that trained is in it.

    Args:
        saved: The checkpoint.
        form: What is written.
        name: Of the folder.
        composed: Whether encoders are a part of the written model.
    """
    base, run = hub_name(saved.backbone.path), saved.run
    peft = saved.peft or (None if saved.adapter is None else saved.adapter.peft())
    what = _adapters(peft) if form == "adapter" else "adapters merged into the weights" if form == "merged" else ""
    front: dict[str, Any] = {"library_name": "peft" if form == "adapter" else "transformers"}
    front |= {"pipeline_tag": TASKS.get(saved.family, "text-generation")}
    if base is not None:
        front |= {"base_model": base, "base_model_relation": "adapter" if form == "adapter" else "finetune"}
    if (license_ := base_license(saved.backbone)) is not None:
        front["license"] = license_
    names = [_text(source.get("name")) for sources in _dict(run, "data").values() for source in sources]
    if on_hub := sorted({each for each in names if "/" in each}):
        front["datasets"] = on_hub
    front["tags"] = ["lit_alignment", *([peft.peft_type.value.lower()] if peft is not None else [])]
    named = f"[{base}](https://huggingface.co/{base})" if base else f"`{_text(Path(saved.backbone.path).name)}`"
    trained = f" by {_text(run['method'])}" if run.get("method") else ""
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {_text(name)}",
        f"{named}, trained{trained} with lit_alignment{f' ({what})' if what else ''}.",
        *_license_note(license_ if base else None, named),
        f"## Use\n\n{_use(saved, name, composed)}",
        *_training(run),
    ]
    return "\n\n".join(parts) + "\n"


def hub_name(path: str) -> str | None:
    """A base's name on the hub; None for a folder of this machine."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None
    return path if is_name and not Path(path).expanduser().is_dir() else None


def base_license(backbone: BackboneConfig) -> str | None:
    """The license that the base's own card names, if it is on this machine."""
    folder = Path(local_path(backbone.path))
    card: Any = folder / "README.md"
    if not folder.is_dir():
        cache, revision = constants.HF_HUB_CACHE, backbone.revision
        card = try_to_load_from_cache(backbone.path, "README.md", cache_dir=cache, revision=revision)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        found = FRONT.match(Path(card).read_text(encoding="utf-8"))
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    given = values.get("license") if isinstance(values, dict) else None
    return given if isinstance(given, str) else None


def _license_note(license_: str | None, named: str) -> list[str]:
    return [] if license_ else [f"Its license is that of its base, {named}, and of the data."]


def _adapters(peft: PeftConfig | None) -> str:
    if peft is None:
        return "an adapter"
    rank = f" of rank {peft.r}, alpha {peft.lora_alpha:g}" if isinstance(peft, LoraConfig) else ""
    return f"an adapter: {peft.peft_type.value}{rank}"


def _use(saved: Saved, name: str, composed: bool) -> str:
    if composed:
        return "It is a LLaVA: `LlavaForConditionalGeneration.from_pretrained` loads it, and vLLM serves it."
    call = ASKING.get(saved.family, ASKING["text"])
    if saved.head is not None and saved.head.labels == ("reward",):
        call = REWARD
    code = f"from lit_alignment import {call.partition('.')[0]}\n\nprint({call.format(name)})"
    shell = f"    lit-alignment chat {name}\n\n" if saved.family == "text" else ""
    return f"{shell}```python\n{code}\n```"


def _training(run: dict[str, Any]) -> list[str]:
    """Data, settings and figures, so far as they are known."""
    parts = []
    rows = [
        (f"{split}: {_text(source.get('name'))}", _text(source.get("records", "")))
        for split, sources in _dict(run, "data").items()
        for source in sources
    ]
    if rows:
        parts.append("## Data\n\n" + _table(("source", "records"), rows))
    if settings := _dict(run, "settings"):
        where = f"After {_text(run.get('step'))} optimizer steps, in epoch {_text(run.get('epoch'))}.\n\n"
        parts.append("## Settings\n\n" + where + _table(("setting", "value"), list(settings.items())))
    if figures := _dict(run, "figures"):
        numbers = [(key, f"{value:.4g}") for key, value in figures.items() if isinstance(value, int | float)]
        at = _text(run.get("measured_at"))
        parts.append(f"## Figures\n\nMeasured after step {at}.\n\n" + _table(("metric", "value"), numbers))
    return parts


def _dict(run: dict[str, Any], key: str) -> dict[str, Any]:
    found = run.get(key)
    return found if isinstance(found, dict) else {}


def _table(head: tuple[str, str], rows: list[tuple[Any, Any]]) -> str:
    lines = [head, ("---", "---"), *((_text(name), _text(value)) for name, value in rows)]
    return "\n".join(f"| {first} | {second} |" for first, second in lines)


def _text(value: Any) -> str:
    """A value of a checkpoint as text that opens no markup and no further line."""
    return re.sub(r"[^\w .,:;/()\[\]{}'\"+%@=*#-]", "?", str(value))[:300]
