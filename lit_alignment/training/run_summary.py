"""What a checkpoint says of the training that made it, for the card of an export."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lit_alignment.data.base import AlignmentDataModule, datamodule_of
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.optimization import OptimizerConfig

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def run_summary(trainer: Trainer, optimizer: OptimizerConfig, algorithm: str, method: dict[str, Any]) -> dict[str, Any]:
    """Data and settings of a run, as plain values.

    Args:
        trainer: That trains.
        optimizer: Its settings.
        algorithm: Name of its class.
        method: Settings of the method.
    """
    data = datamodule_of(trainer)
    rows = {"tokens_per_batch": data.tokens_per_batch} if data.packing else {"batch_size": data.batch_size}
    settings = {
        "optimizer": algorithm,
        "learning_rate": optimizer.learning_rate,
        "schedule": optimizer.schedule,
        "warmup": optimizer.warmup,
        "weight_decay": optimizer.weight_decay,
        "packing": data.packing,
        **rows,
        "max_length": data.encoding.max_length,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "seed": data.seed,
    }
    progress = {"step": trainer.global_step, "epoch": trainer.current_epoch + 1}
    return {**progress, "settings": {**settings, **method}, "data": _data(data)}


def _data(data: AlignmentDataModule) -> dict[str, list[dict[str, Any]]]:
    """By split the sources, each with its name and its records; never where a file lies on this machine."""
    found = {}
    for split in ("train", "val"):
        counts = data.reports[split].sources if split in data.reports else {}
        sources = data.sources[split]
        found[split] = [{"name": _name(each), "records": counts.get(each.title)} for each in sources]
    return found


def _name(source: SourceConfig) -> str:
    if source.path is None or HUB_NAME.fullmatch(source.path) is None:
        return source.title
    path = Path(source.path)  # the file of a run may be gone when it saves
    return source.title if path.suffix or path.exists() else source.path
