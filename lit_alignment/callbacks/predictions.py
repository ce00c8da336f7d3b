"""Predictions to JSONL, one file for each way of generating."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_alignment.data.base import datamodule_of
from lit_alignment.data.prompts import PromptBatch, PromptItem
from lit_alignment.errors import ConfigError
from lit_alignment.generation.prediction_file import PredictionFile
from lit_alignment.generation.settings import Answer
from lit_alignment.modules.base import AlignmentModule


class PredictionWriter(Callback):
    """Write `<output_dir>/<generation name>.jsonl`, and go on where a killed run stopped.

    Lines are `{id, dataset, messages, answers: [{id, content, finish_reason, num_tokens, logprob?}], label, meta}`
    in the order of the prompts. A prompt is asked again only if some file lacks it.

    Args:
        output_dir: Folder of the files.
        overwrite: Answer everything again instead of going on.
    """

    def __init__(self, output_dir: str = "predictions", overwrite: bool = False) -> None:
        """Files are opened when the run starts."""
        self.output_dir, self.overwrite = Path(output_dir), overwrite
        self._files: dict[str, PredictionFile] = {}
        self._done: dict[str, set[tuple[str, str]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module ask what is answered already."""
        if stage != "predict":
            return
        if not isinstance(pl_module, AlignmentModule):
            raise ConfigError(f"PredictionWriter needs a module of lit_alignment, not {type(pl_module).__name__}.")
        datamodule_of(trainer).answered = partial(self._open_files, trainer, pl_module)

    def _open_files(self, trainer: Trainer, module: AlignmentModule) -> set[tuple[str, str]]:
        """Check the files that are there, and return what all of them have answered."""
        for name in module.generation:
            file = PredictionFile(self.output_dir / f"{name}.jsonl", trainer.global_rank)
            if self.overwrite:
                file.remove()
            file.check_settings(_settings(trainer, module, name))
            file.repair()
            self._files[name] = file
            self._done[name] = file.answered()
        answered = set.intersection(*self._done.values())
        if answered:
            rank_zero_info(f"{len(answered)} prompts are answered in {self.output_dir}; going on.")
        trainer.strategy.barrier("predictions")  # all ranks have read before any writes
        if answered >= set(self._order(trainer)):
            self._finish(trainer)  # a run that was killed just before its end left nothing to predict
        return answered

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, list[list[Answer]]],
        batch: PromptBatch,
        *_: Any,
    ) -> None:
        """Append the batch's answers."""
        for name, answers in outputs.items():
            lines = [
                _line(item, found)
                for item, found in zip(batch.items, answers, strict=True)
                if (item.dataset, item.id) not in self._done[name]
            ]
            self._files[name].append(lines)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the files in order."""
        trainer.strategy.barrier("predictions")
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for file in self._files.values():
                file.finish(self._order(trainer))
                rank_zero_info(f"predictions: {file.path}")

    @staticmethod
    def _order(trainer: Trainer) -> dict[tuple[str, str], int]:
        prompts = datamodule_of(trainer).examples["predict"]
        return {key: index for index, key in enumerate(zip(prompts["dataset"], prompts["id"], strict=True))}


def _settings(trainer: Trainer, module: AlignmentModule, name: str) -> dict[str, Any]:
    """What decides the answers."""
    checkpoint = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    return {
        "model": module.backbone.path,
        "revision": module.backbone.revision,
        "checkpoint": None if checkpoint is None else [str(checkpoint), checkpoint.stat().st_mtime_ns],
        **asdict(module.generation[name]),
    }


def _line(item: PromptItem, answers: list[Answer]) -> dict[str, Any]:
    return {
        "id": item.id,
        "dataset": item.dataset,
        "messages": item.messages,
        "answers": [answer.to_dict() for answer in answers],
        "label": item.label if item.label is not None else item.reference,
        "meta": item.meta,
    }
