"""Encode all passages anew while the passage encoder learns, so that the index does not lag far behind it."""

import copy
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lit_alignment.checkpoints.states import is_inside
from lit_alignment.data.passages import format_passage
from lit_alignment.distributed.fsdp2 import FSDP2Strategy
from lit_alignment.errors import ConfigError
from lit_alignment.models.dual_encoder import weights_hash
from lit_alignment.modules.base import alignment_module
from lit_alignment.retrieval.build import IndexBuilder
from lit_alignment.retrieval.files import read_manifest
from lit_alignment.retrieval.index import PassageIndex, make_faiss
from lit_alignment.retrieval.passage_retriever import PassageRetriever


class IndexRefresh(Callback):
    """Make a new index every so many steps, split over the ranks, and let it take the old one's place in one step.

    Each index is also written to `<run folder>/index/step-N`, for predict, and so that a resumed run has the very index
    that it had. Logged are `train/index_staleness` (steps since the weights that made the index) and
    `train/refresh_seconds`.

    Args:
        every_n_steps: Optimizer steps between two refreshes.
        background: Encode with a copy of the encoder while training continues; the new index is used from the first
            step at which all ranks have it. Which step that is depends on the machine, so such a run does not repeat
            exactly.
        keep: Indexes to keep on disk.
    """

    def __init__(self, every_n_steps: int = 100, background: bool = False, keep: int = 2) -> None:
        """Nothing is encoded before the fit starts."""
        if every_n_steps < 1 or keep < 1:
            raise ConfigError("IndexRefresh: every_n_steps and keep must be 1 or more.")
        self.every_n_steps, self.background, self.keep = every_n_steps, background, keep
        self._folder: Path | None = None
        self._made_at = 0
        self._saved: dict[str, Any] = {}
        self._last_step = 0
        self._work: _Encoding | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module whose passage encoder does not learn."""
        if stage != "fit":
            return
        retriever = _retriever(pl_module)
        if retriever is None or retriever.trained != "both":
            raise ConfigError("IndexRefresh needs a RAGModule with train_retriever: both; else no passage changes.")
        if self.background and isinstance(trainer.strategy, FSDP2Strategy):
            raise ConfigError("IndexRefresh: a sharded encoder cannot work in the background. Set background: false.")
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "index"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a resumed run's index, or make one, where the weights are not those that made the one at hand."""
        retriever = _retriever(pl_module)
        if retriever is None:
            return
        self._last_step, retriever.refreshed = trainer.global_step, True
        if self._saved:
            self._made_at = int(self._saved["step"])
            folder = Path(self._saved["folder"])
            own = [str(self._folder), str(Path(retriever.index_config.path).absolute().parent)]
            if (self._made_at == 0 and not folder.exists()) or not is_inside(str(folder), own):
                return self._check_first(trainer, retriever)
            try:
                found = read_manifest(folder)
            except (FileNotFoundError, ConfigError):
                rank_zero_warn(f"{folder}: the index of this checkpoint is gone; all passages are encoded anew.")
            else:
                if found.step == self._made_at:
                    retriever.index = PassageIndex.load(folder)
                    return None
        self._check_first(trainer, retriever)
        return None

    def _check_first(self, trainer: Trainer, retriever: PassageRetriever) -> None:
        if retriever.index.manifest.encoder_hash != weights_hash(retriever.encoder.passage_tower):
            self._swap(trainer, retriever, _Encoding(trainer, retriever, None))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take over what the background has made, on all ranks at the same step."""
        retriever = _retriever(pl_module)
        if self._work is None or retriever is None:
            return
        done = torch.tensor(float(self._work.done), device=pl_module.device)
        if float(trainer.strategy.reduce(done, reduce_op="sum")) == trainer.world_size:
            self._swap(trainer, retriever, self._work)
            self._work = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start a refresh when it is due."""
        step, retriever = trainer.global_step, _retriever(pl_module)
        if step == self._last_step or retriever is None:
            return
        self._last_step = step
        if step % self.every_n_steps == 0 and self._work is None:
            if self.background:
                tower = copy.deepcopy(retriever.encoder.passage_tower).eval()
                self._work = _Encoding(trainer, retriever, tower)
            else:
                self._swap(trainer, retriever, _Encoding(trainer, retriever, None))
        pl_module.log("train/index_staleness", float(step - self._made_at))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the background finish."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _swap(self, trainer: Trainer, retriever: PassageRetriever, work: "_Encoding") -> None:
        embeddings = work.wait()
        begin = time.monotonic()
        gathered = trainer.strategy.all_gather(embeddings)  # [ranks, rows, D], or [rows, D] for one
        rows = gathered.reshape(-1, gathered.shape[-1]) if trainer.world_size > 1 else gathered
        old, config = retriever.index, retriever.index_config
        if trainer.world_size > 1:  # rank r has encoded r, r + ranks, ...
            rows = rows.view(trainer.world_size, -1, rows.shape[-1]).transpose(0, 1).reshape(-1, rows.shape[-1])
        shards = [rows[: len(old)].to("cpu")]
        manifest = replace(
            old.manifest, encoder_hash=work.hash, step=work.step, dtype="float32", shards=[], checksums={}
        )
        faiss = None if config.search == "exact" else make_faiss(shards, config)
        retriever.index = PassageIndex(manifest, shards, old.passages, faiss)
        self._made_at = work.step
        seconds = work.seconds + time.monotonic() - begin
        if trainer.is_global_zero and self._folder is not None:
            self._write(retriever, self._folder / f"step-{work.step:08d}")
        trainer.strategy.barrier("index")
        rank_zero_info(f"index: {len(old)} passages encoded anew at step {work.step} in {seconds:.1f} s")
        for logger in trainer.loggers:
            logger.log_metrics({"train/refresh_seconds": seconds}, trainer.global_step)

    def _write(self, retriever: PassageRetriever, folder: Path) -> None:
        index = retriever.index
        builder = IndexBuilder(replace(retriever.index_config, path=str(folder), dtype="float32"), index.manifest)
        builder.create(index.at(torch.arange(len(index))))
        builder.write(range(len(index)), index.shards[0])
        builder.finish()
        for old in sorted(folder.parent.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)

    def state_dict(self) -> dict[str, Any]:
        """Which index the run has."""
        folder = "" if self._folder is None else str((self._folder / f"step-{self._made_at:08d}").absolute())
        return {"step": self._made_at, "folder": folder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember which index the run had."""
        self._saved = state_dict


def _retriever(module: LightningModule) -> PassageRetriever | None:
    return alignment_module(module).passage_retriever


class _Encoding:
    """This rank's part of all passages, encoded at once or in a thread.

    Args:
        trainer: Tells rank and step.
        retriever: The passages and their encoder.
        tower: A copy to encode with in a thread; None encodes at once with the module's own.
    """

    def __init__(self, trainer: Trainer, retriever: PassageRetriever, tower: PreTrainedModel | None) -> None:
        self.step = trainer.global_step
        self.hash = weights_hash(tower or retriever.encoder.passage_tower)
        self.seconds = 0.0
        self._result: Tensor | None = None
        self._error: BaseException | None = None
        self._retriever, self._tower = retriever, tower
        number = len(retriever.index)
        per_rank = -(-number // trainer.world_size)
        # Every rank encodes as many, the last ones perhaps a passage twice: sharded encoders work in step.
        positions = torch.arange(per_rank) * trainer.world_size + trainer.global_rank
        self._positions = positions.clamp(max=number - 1)
        self._thread: threading.Thread | None = None
        if tower is None:
            self._run()
        else:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the part is encoded."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Tensor:
        """The embeddings, [rows, D], when they are there."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise TypeError("nothing was encoded.")
        return self._result

    def _run(self) -> None:
        begin = time.monotonic()
        try:
            retriever, form = self._retriever, self._retriever.config.passage_format
            parts = []
            with torch.no_grad():
                for positions in torch.split(self._positions, retriever.index_config.batch_size):
                    texts = [
                        format_passage(form, passage.title, passage.text) for passage in retriever.index.at(positions)
                    ]
                    parts.append(retriever.encoder.passages(texts, self._tower).float())
            self._result = torch.cat(parts)
        except BaseException as error:  # raised again by whoever waits
            self._error = error
        self.seconds = time.monotonic() - begin
