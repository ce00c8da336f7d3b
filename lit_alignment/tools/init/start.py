"""What a configuration starts from: a model, or an adapter that is trained further over its base."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from lit_alignment.errors import ConfigError
from lit_alignment.tools.parsers import TINY

SCORING = ("classification", "reward")


@dataclass(frozen=True)
class Start:
    """A model, and what is loaded over it.

    Args:
        path: Folder or name of the model.
        revision: Of the model on the hub.
        tokenizer: Folder of the tokenizer, if it is not the model's own.
        adapter: Folder of the adapter that is trained further, if there is one.
    """

    path: str
    revision: str = "main"
    tokenizer: str | None = None
    adapter: str | None = None

    def backbone(self) -> str:
        """The settings of the backbone, as YAML."""
        settings = {"path": self.path}
        if self.revision != "main":
            settings["revision"] = self.revision
        if self.tokenizer is not None:
            settings["tokenizer"] = self.tokenizer
        return f"{{{', '.join(f'{name}: {word(value)}' for name, value in settings.items())}}}"


def starting(model: str, method: str, labels: list[str]) -> Start:
    """What a method starts from, given a model or an adapter.

    Args:
        model: A folder, or a name on the hub.
        method: What trains.
        labels: Of a classifier's records.

    Raises:
        ConfigError: If it is an adapter that the method cannot train further.
        CheckpointError: If its description is none.
    """
    folder = Path(model).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return Start(model)
    # Heavy imports, which only an adapter needs.
    from lit_alignment.checkpoints.saved import read_saved
    from lit_alignment.models.adapters import AdapterConfig

    peft = AdapterConfig(str(folder)).peft()
    if not peft.base_model_name_or_path:
        raise ConfigError(f"{folder / 'adapter_config.json'}: base_model_name_or_path is missing. Name its base there.")
    if peft.is_prompt_learning:
        raise ConfigError(
            f"--model {model}: an adapter of virtual tokens without the encoder that made them, which cannot train on. "
            f"Start from its base (--model {peft.base_model_name_or_path}), or resume its run: fit with --ckpt_path."
        )
    saved = read_saved(folder)
    scored: list[str] | None = None if saved.head is None else list(saved.head.labels)
    if scored is None and peft.task_type == "SEQ_CLS":
        scored = []  # a head, of which the folder does not say the labels
    base = saved.backbone
    if scored is None and method in SCORING:
        raise ConfigError(
            f"--model {model}: an adapter of a model that writes text, without the head that {method} needs. Merge it "
            f"into its base: lit-alignment merge {model} --out FOLDER, then --model FOLDER."
        )
    wanted = {"classification": labels, "reward": ["reward"]}.get(method)
    if scored is not None and scored != wanted:
        scores = f"scores {', '.join(scored[:5])}" if scored else "scores"
        needed = "writes text" if wanted is None else f"scores {', '.join(wanted[:5])}"
        raise ConfigError(
            f"--model {model}: an adapter of a model that {scores}, and {method} needs one that {needed}. "
            f"Start from its base: --model {base.path}."
        )
    return Start(base.path, base.revision, base.tokenizer, str(folder))


def word(text: str) -> str:
    """A text as a value in YAML."""
    plain = re.fullmatch(r"[\w./-]+", text) and re.search(r"[./]", text) and re.search("[a-zA-Z]", text)
    return text if plain or text == TINY else json.dumps(text, ensure_ascii=False)
