"""Predictions to JSONL, one file for each way of making them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_alignment.checkpoints.resuming import predictions_folder
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.batching.items import ItemBatch, PromptBatch
from lit_alignment.data.encoding.prompts import Item
from lit_alignment.data.sources.cache import fingerprint
from lit_alignment.data.sources.content import content_hash
from lit_alignment.distributed.rank_zero import on_rank_zero
from lit_alignment.errors import ConfigError
from lit_alignment.files import relative
from lit_alignment.generation.prediction_file import PredictionFile, lock_folder, unlock_folder
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.paths import cache_dir, local_path


class PredictionWriter(Callback):
    """Write `<output_dir>/<name>.jsonl`, and resume where a killed run stopped.

    Names are those of the generation settings, `classes` or `rewards`. Lines are `{id, dataset, messages, ..., label,
    meta, fingerprint}`, in the order of the records, with `answers: [{id, content, finish_reason, num_tokens,
    logprob?}]`, or `prediction` and `probabilities`, or `answers` and `rewards`. A record is asked again only if some
    file lacks it, or has its answer with another fingerprint: of its tokens, media, responses, label and meta.

    Args:
        output_dir: Folder of the files; by default `predictions`, in the run of a checkpoint with a folder for each.
        overwrite: Answer everything again instead of resuming.
    """

    def __init__(self, output_dir: str | None = None, overwrite: bool = False) -> None:
        """Files are opened when the run starts."""
        self._given = None if output_dir is None else Path(output_dir)
        self.output_dir, self.overwrite = self._given or predictions_folder(None), overwrite
        self.engine: dict[str, Any] = {}  # what decides the predictions besides, where another engine makes them
        self._files: dict[str, PredictionFile] = {}
        self._done: dict[str, set[tuple[str, str]]] = {}
        self._asked: dict[tuple[str, str], str] = {}
        self._lock: IO[bytes] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module ask what is answered already."""
        if stage != "predict":
            return
        if not isinstance(pl_module, AlignmentModule):
            raise ConfigError(f"PredictionWriter needs a module of lit_alignment, not {type(pl_module).__name__}.")
        datamodule_of(trainer).answered = partial(self._open_files, trainer, pl_module)

    def write_for(self, checkpoint: str | Path | None) -> None:
        """Write the predictions of a checkpoint, or of a model without one, where they belong."""
        self.output_dir = self._given or predictions_folder(checkpoint)

    def _open_files(self, trainer: Trainer, module: AlignmentModule) -> set[tuple[str, str]]:
        """Check the files that are there, and return what all of them have answered."""
        self.write_for(trainer.ckpt_path)
        self._asked = datamodule_of(trainer).asked()
        common = _settings(trainer, module) | self.engine
        settings = {name: common | decides for name, decides in module.prediction_settings().items()}
        self._files = {
            name: PredictionFile(self.output_dir / relative(f"{name}.jsonl", "model.generation"), trainer.global_rank)
            for name in settings
        }
        on_rank_zero(trainer, partial(self._prepare, settings))
        changed = set()
        for name, file in self._files.items():
            file.repair()
            self._done[name], others = file.answered(self._asked)
            changed |= others
        answered = set.intersection(*self._done.values())
        if changed:
            rank_zero_info(
                f"{len(changed)} prompts of {self.output_dir} have changed since they were answered, or an earlier "
                "version has not noted what they were; they are answered again."
            )
        if answered:
            rank_zero_info(f"{len(answered)} prompts are answered in {self.output_dir}; resuming.")
        trainer.strategy.barrier("predictions")  # all ranks have read before any writes
        if answered >= self._asked.keys():
            self._finish(trainer)  # a run that was killed just before its end left nothing to predict
        return answered

    def _prepare(self, settings: dict[str, dict[str, Any]]) -> None:
        """On one process: take the folder, and remove what is there, or make sure that it belongs to this run."""
        if self._lock is None:
            self._lock = lock_folder(self.output_dir)
        for name, file in self._files.items():
            if self.overwrite:
                file.remove()
            file.check_settings(settings[name])
        for name, file in self._files.items():
            file.write_settings(settings[name])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the folder back."""
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same."""
        self.teardown(trainer, pl_module, "predict")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, list[dict[str, Any]]],
        batch: PromptBatch | ItemBatch,
        *_: Any,
    ) -> None:
        """Append the batch's predictions."""
        for name, predictions in outputs.items():
            self.write(name, list(zip(batch.items, predictions, strict=True)))

    def missing(self) -> int:
        """Predictions that all files together lack."""
        return sum(len(self._asked.keys() - done) for done in self._done.values())

    def wants(self, name: str, item: Item) -> bool:
        """Whether a file still lacks an item."""
        return (item.dataset, item.id) not in self._done[name]

    def write(self, name: str, predictions: Sequence[tuple[Item, dict[str, Any]]]) -> None:
        """Append the predictions that a file lacks."""
        wanted = [each for each in predictions if self.wants(name, each[0])]
        self._files[name].append([_line(*each, self._asked[each[0].dataset, each[0].id]) for each in wanted])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the files in order."""
        trainer.strategy.barrier("predictions")
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for file in self._files.values():
                file.finish(self._asked)
                rank_zero_info(f"predictions: {file.path}")


def _settings(trainer: Trainer, module: AlignmentModule) -> dict[str, Any]:
    """What decides the predictions, whatever the method."""
    checkpoint = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    folders = {"weights": Path(local_path(module.backbone.path))}
    if module.adapter is not None:
        folders["adapter_weights"] = Path(module.adapter.path).expanduser()
    return {
        "model": module.backbone.path,
        "revision": module.backbone.revision,
        "dtype": module.backbone.dtype,
        "precision": str(trainer.precision),
        "adapter": module.adapter and module.adapter.path,
        **{name: _content(folder) for name, folder in folders.items()},
        "checkpoint": None if checkpoint is None else [str(checkpoint), checkpoint.stat().st_mtime_ns],
    }


def _content(folder: Path) -> str:
    """A hash of what a model's folder holds; empty for a model of the hub, whose revision says it."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".safetensors", ".bin", ".json"))
    return fingerprint([(file.name, content_hash(file, cache_dir())) for file in files]) if files else ""


def _line(item: Item, predicted: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    label = item.reference if item.label is None else item.label
    line = {"id": item.id, "dataset": item.dataset, "messages": item.messages, **predicted}
    return line | {"label": label, "meta": item.meta, "fingerprint": fingerprint}
