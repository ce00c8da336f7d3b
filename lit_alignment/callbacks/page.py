"""The page of a run, put together from what the callbacks of its training have noted."""

import os
import platform
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment.callbacks.curves import Curves
from lit_alignment.data.base import datamodule_of
from lit_alignment.files import replaced
from lit_alignment.modules.base import AlignmentModule, alignment_module
from lit_alignment.report.page import render_run
from lit_alignment.report.run import FILE, CherryPick, Judge, TrainingRun, to_json
from lit_alignment.secrets import masked

PAGE = "report.html"


class ReportPart(Callback):
    """A callback that notes something for the page of a run.

    Attributes:
        curves: What was logged, over optimizer steps.
        picks: Records with what the model made of them.
        right: What is counted where a record has been met.
    """

    curves: Curves
    picks: list[CherryPick]
    right = "exact matches"


def write_page(directory: Path, trainer: Trainer, module: LightningModule) -> None:
    """Write `report.html`, and the data in it as `report.json`, into the folder of a run; for one process.

    Args:
        directory: The folder.
        trainer: In or after its training.
        module: What it trains.
    """
    run = training_run(directory, trainer, alignment_module(module))
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in ((FILE, to_json(run)), (PAGE, render_run(run))):
        with replaced(directory / name) as file:
            file.write(text)


def training_run(directory: Path, trainer: Trainer, module: AlignmentModule) -> TrainingRun:
    """What is known of a training so far.

    Args:
        directory: Its folder.
        trainer: That trains.
        module: What it trains.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    parts = [each for each in callbacks if isinstance(each, ReportPart)]
    picking = [part for part in parts if part.picks]
    reports = datamodule_of(trainer).reports
    config = directory / "config.yaml"
    curves = {name: points for part in parts for name, points in part.curves.items()}  # the last part has most
    return TrainingRun(
        method=type(module).__name__.removesuffix("Module"),
        model=_model_name(module),
        data=list(reports["train"].sources) if "train" in reports else [],
        folder="/".join(directory.absolute().parts[-2:]),
        machine=_machine(trainer, module),
        config=shown_config(config.read_text(encoding="utf-8")) if config.is_file() else "",
        curves=dict(curves),
        charts=[list(group) for group in module.charts],
        judge=_judge(trainer, curves.keys()),
        picks=[pick for part in picking for pick in part.picks],
        right=picking[0].right if picking else ReportPart.right,
        confusion=module.last_confusion(),
        notable=list(module.notable()),
        splits=[asdict(report) for report in reports.values()],
    )


def shown_config(text: str) -> str:
    """A configuration without secrets, which still is YAML.

    Args:
        text: Of `config.yaml`; where it hides what it has to, it stays to the letter.
    """
    values = yaml.safe_load(text)
    hidden = masked(values)
    return text if hidden == values else yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def _judge(trainer: Trainer, logged: Collection[str]) -> Judge | None:
    """What ranks the checkpoints; else the loss of validation, where there is one."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor is not None and saver.monitor in logged:
            return Judge(saver.monitor, "max" if saver.mode == "max" else "min")
    return Judge("val/loss") if "val/loss" in logged else None


def _model_name(module: AlignmentModule) -> str:
    """The last part of a model's name or folder."""
    name = module.backbone.path.rstrip("/").rpartition("/")[2].rpartition("--")[2]
    return f"{name} with random weights" if module.backbone.weights == "random" else name


def _machine(trainer: Trainer, module: AlignmentModule) -> dict[str, str]:
    """What a training runs on, by heading."""
    from lit_alignment import __version__

    device = module.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    number, nodes = trainer.world_size, trainer.num_nodes
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    facts = {
        "device": name,
        "processes": f"{number} on {nodes} nodes" if nodes > 1 else str(number),
        "precision": str(trainer.precision),
        "trained weights": f"{trained:,}" if trained else "",
        "lit-alignment": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    return {heading: value for heading, value in facts.items() if value}
