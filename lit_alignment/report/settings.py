"""Settings of a run as its `config.yaml` has them, flat, and those of them that a reader asks for first."""

from collections.abc import Sequence
from typing import Any

import yaml

# Heading, and endings of the names of settings, the first of which that is set is shown.
ASKED_FIRST = (
    ("learning rate", ("optimizer.learning_rate",)),
    ("schedule", ("optimizer.schedule",)),
    ("optimizer", ("optimizer.algorithm",)),
    ("epochs", ("trainer.max_epochs",)),
    ("steps", ("trainer.max_steps",)),
    ("tokens in a batch", ("data.tokens_per_batch",)),
    ("batch size", ("data.batch_size",)),
    ("accumulated batches", ("trainer.accumulate_grad_batches",)),
    ("clipped at", ("trainer.gradient_clip_val",)),
    ("longest example", ("encoding.max_length",)),
    ("loss", ("model.losses.0.kind", "model.losses.0.name", "model.loss.kind", "model.loss.name", "model.loss")),
    ("beta", ("model.losses.0.beta", "model.loss.beta")),
    ("adapter", ("peft.class_path", "peft.peft_type")),
    ("rank", ("peft.r",)),
    ("weights", ("backbone.weights",)),
    ("precision", ("trainer.precision",)),
    ("quantization", ("backbone.quantization",)),
    ("strategy", ("trainer.strategy", "trainer.strategy.class_path")),
    ("seed", ("seed_everything",)),
)
SAYS_NOTHING: tuple[Any, ...] = (None, "", "auto", "none", -1, [], {})


def flat(config: str) -> dict[str, Any]:
    """Values of a configuration by dotted name, `init_args` left out; nothing of one that cannot be read."""
    try:
        values = yaml.safe_load(config) or {}
    except yaml.YAMLError:
        return {}
    found: dict[str, Any] = {}
    _flatten(values, "", found)
    return found


def _flatten(value: Any, name: str, found: dict[str, Any]) -> None:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not items:
        found[name] = value
    for key, each in items:
        _flatten(each, name if key == "init_args" else f"{name}.{key}".lstrip("."), found)


def asked_first(settings: dict[str, Any]) -> dict[str, str]:
    """What a reader asks for first, by heading; what is not set, or left to its default word, is passed over."""
    shown = {}
    for heading, endings in ASKED_FIRST:
        for ending in endings:
            named = [v for name, v in settings.items() if name == ending or name.endswith(f".{ending}")]
            if named and named[0] not in SAYS_NOTHING:
                shown[heading] = as_text(named[0]).removeprefix("peft.")
                break
    return shown


def differing(runs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, by name, with a value for each run; "" where it is not set.

    Those of the model and the data come before those of the trainer; the logger's say only where a run is.
    """
    names = dict.fromkeys(name for settings in runs for name in settings if not name.startswith("trainer.logger"))
    names = dict.fromkeys(sorted(names, key=lambda name: name.startswith("trainer.")))
    table = {name: [as_text(settings.get(name)) for settings in runs] for name in names}
    return {name: row for name, row in table.items() if len(set(row)) > 1}


def as_text(value: Any) -> str:
    """A value as YAML writes it; "" for none."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
    return str(value)
