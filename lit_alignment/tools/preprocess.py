"""`lit-alignment preprocess`: images or sounds -> a cache of features, so that training needs no encoder.

B files, P patches, D width
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lit_alignment.callbacks.progress import progress
from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import PlannedBatch
from lit_alignment.data.multimodal.feature_cache import (
    INDEX,
    UNREADABLE,
    CacheIndex,
    ShardWriter,
    check_same,
    read_index,
    relative_name,
    shards_of,
    stored,
    write_index,
    written_names,
)
from lit_alignment.data.multimodal.media import MODALITIES, MediaReader, UnreadableMediaError, files_of, list_files
from lit_alignment.data.sources.columns import UnusableRecord
from lit_alignment.data.vlm import VLMDataModule
from lit_alignment.errors import ConfigError
from lit_alignment.models.multimodal.modality import MediaShape, MediaTower, ModalityConfig
from lit_alignment.models.multimodal.reading import cache_index, file_reader
from lit_alignment.models.multimodal.vision import EncoderConfig, load_encoder
from lit_alignment.tools import parsers
from lit_alignment.trainer_cli import ToolCLI, build_for_tool


@dataclass
class FileBatch:
    """Files to encode together.

    Args:
        names: Their names in the cache.
        inputs: What the processors made of them, for each encoder; empty if none could be read.
        unreadable: Files that could not be read, each with the reason.
    """

    names: list[str]
    inputs: list[Tensor]
    unreadable: list[tuple[str, str]]


class FileDataModule(LightningDataModule):
    """Files for `predict`, which encodes them; each process has its own.

    Args:
        files: Name in the cache and path of each.
        reader: Reads them.
        batch_size: Files to encode together.
        num_workers: Processes that read ahead.
    """

    def __init__(
        self, files: Sequence[tuple[str, str]], reader: MediaReader, batch_size: int = 64, num_workers: int = 0
    ) -> None:
        """Nothing is read yet."""
        super().__init__()
        self.files, self.reader, self.batch_size, self.num_workers = files, reader, batch_size, num_workers

    def predict_dataloader(self) -> PlannedLoader[FileBatch]:
        """This process's files in order, as many at a time as are encoded together."""
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        own = list(range(len(self.files)))[rank::ranks]
        plan = [PlannedBatch(own[i : i + self.batch_size], 0.0) for i in range(0, len(own), self.batch_size)]
        return PlannedLoader(lambda epoch: plan, self._read, len(plan), self.num_workers)

    def _read(self, planned: PlannedBatch) -> FileBatch:
        names, parts, unreadable = [], [], []
        for name, path in (self.files[index] for index in planned.indices):
            try:
                parts.append(self.reader.read(path))
                names.append(name)
            except UnreadableMediaError as error:
                unreadable.append((path, str(error)))
        return FileBatch(names, [torch.stack(each) for each in zip(*parts, strict=True)], unreadable)


class FeatureModule(LightningModule):
    """The frozen encoders of a modality.

    Args:
        shape: The modality.
    """

    def __init__(self, shape: MediaShape) -> None:
        """Weights come in `configure_model`."""
        super().__init__()
        self.shape = shape
        self.tower: MediaTower | None = None

    def configure_model(self) -> None:
        """Load the encoders, once."""
        if self.tower is None:
            device = self.trainer.strategy.root_device.type
            encoders = [load_encoder(each, self.shape.name, False, device) for each in self.shape.modality.encoders]
            self.tower = MediaTower(encoders, nn.Identity(), trained=False)

    @torch.no_grad()
    def predict_step(self, batch: FileBatch, batch_idx: int) -> Tensor | None:
        """Features of the files that could be read, [B, P, D]; None if there are none."""
        return self.tower.features(batch.inputs) if batch.names and self.tower is not None else None


class FeatureWriter(Callback):
    """Write features as they come; a killed run resumes after its last shard.

    Args:
        folder: The cache.
        index: What makes it.
        per_shard: Files in one shard.
    """

    def __init__(self, folder: Path, index: CacheIndex, per_shard: int) -> None:
        """The index is written before anything else, so that a half-made cache says what made it."""
        self.folder, self.index, self.per_shard = folder, index, per_shard
        self._writer: ShardWriter | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Number on from the shards that are there."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / UNREADABLE).unlink(missing_ok=True)
            write_index(self.folder, self.index)
        trainer.strategy.barrier("features")
        self._writer = ShardWriter(self.folder, trainer.global_rank, self.per_shard)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor | None, batch: FileBatch, *_: int
    ) -> None:
        """Take a batch's features, and write down what could not be read."""
        if self._writer is not None and outputs is not None:
            for name, features in zip(batch.names, stored(outputs, self.index.dtype), strict=True):
                self._writer.add(name, features.clone())
        if batch.unreadable:
            with (self.folder / UNREADABLE).open("a", encoding="utf-8") as file:
                for path, reason in batch.unreadable:
                    file.write(json.dumps({"path": path, "reason": reason}) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rest, and say that the cache is complete."""
        if self._writer is not None:
            self._writer.flush()
        trainer.strategy.barrier("features")
        if trainer.is_global_zero:
            write_index(self.folder, replace(self.index, complete=True))


class WithoutCache(ToolCLI):
    """Looks for no cache, since that is only being made."""

    def before_instantiate_classes(self) -> None:
        """Forget the caches that the configuration names."""
        super().before_instantiate_classes()
        for name in MODALITIES:
            modality = self.config.model.init_args.get(name)
            if modality is not None:
                modality.cache = None


def main(arguments: list[str]) -> None:
    """Encode all files that have no features yet, and report those that cannot be read."""
    options, rest = parsers.preprocess().split(arguments)
    if min(options.batch_size, options.per_shard) < 1:
        raise ConfigError("--batch-size and --per-shard must be 1 or more.")
    if options.encoder is not None:
        if rest or options.files is None:
            raise ConfigError(f"--encoder goes with --files and without a configuration (found: {' '.join(rest)}).")
        encoder = EncoderConfig(options.encoder, options.layer, options.keep_cls)
        files = _files_below(options.files, options.modality)
        preprocess(files, MediaShape(options.modality, ModalityConfig([encoder])), {}, options)
        return
    cli = build_for_tool(rest, WithoutCache)
    shapes = cli.model.media_shapes()
    if options.modality not in shapes:
        raise ConfigError(f"the configuration has no model.{options.modality}: give that of a VLMModule.")
    shape, folder = shapes[options.modality], options.files
    files = sorted(set(_data_files(cli, shape.name))) if folder is None else _files_below(folder, shape.name)
    devices = {name: cli.asked[name] for name in ("accelerator", "devices", "num_nodes", "precision")}
    preprocess(files, shape, devices, options)


def preprocess(paths: list[Path], shape: MediaShape, devices: dict[str, Any], options: argparse.Namespace) -> None:
    """Encode files of one modality.

    Args:
        paths: The files, each once.
        shape: The modality.
        devices: Where, as arguments of a Trainer.
        options: What the command line says.

    Raises:
        ConfigError: If there are none, another encoder made what is there, or with `--strict` one cannot be read.
    """
    folder: Path = options.out.expanduser()
    if not paths:
        raise ConfigError(f"no files of kind {shape.name} in {options.files or 'the data'}.")
    root = Path(os.path.abspath(options.files)) if options.files else _common_root(paths)
    index = cache_index(shape, options.dtype, str(root))
    _check_target(folder, index, options.overwrite)
    done = written_names(folder)
    files = [(name, str(path)) for path in paths if (name := relative_name(path, root)) not in done]
    if done:
        print(f"{len(done)} files are encoded in {folder}; resuming.")
    trainer = Trainer(
        **devices,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[progress(), FeatureWriter(folder, index, options.per_shard)],
    )
    data = FileDataModule(files, file_reader(shape), options.batch_size, options.workers)
    if files:
        trainer.predict(FeatureModule(shape), data, return_predictions=False)
    else:  # a run that was killed just before its end left nothing to encode
        write_index(folder, replace(index, complete=True))
    if trainer.is_global_zero:
        _report(folder, index, options.strict)


def _files_below(folder: Path, modality: str) -> list[Path]:
    if not folder.expanduser().is_dir():
        raise ConfigError(f"{folder}: no such folder (looked from {Path.cwd()}). Check --files.")
    return list_files(folder.expanduser(), modality)


def _data_files(cli: ToolCLI, modality: str) -> Iterator[Path]:
    data = cli.datamodule
    if not isinstance(data, VLMDataModule):
        raise ConfigError(f"a VLMDataModule is needed, not {type(data).__name__}; or give --files.")
    for sources in data.sources.values():
        for source in sources:
            for position, (where, raw) in enumerate(source.read()):
                if isinstance(raw, UnusableRecord):
                    continue
                record = data.resolved(data.read(raw, where, position), source)
                yield from (Path(path) for path in files_of(record.messages, modality) if not path.startswith("data:"))


def _common_root(paths: list[Path]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths]))


def _check_target(folder: Path, index: CacheIndex, overwrite: bool) -> None:
    """Go on with a cache that the same encoder has begun; refuse any other."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / INDEX).is_file():
        found = read_index(folder)
        check_same(found, index, folder)
        if replace(found, complete=False, encoders=[]) != replace(index, encoders=[]):
            raise ConfigError(f"{folder}: was made with another --dtype or --files. Add --overwrite, or change --out.")
    elif shards_of(folder):
        raise ConfigError(f"{folder}: holds shards without an index. Add --overwrite, or choose another --out.")


def _report(folder: Path, index: CacheIndex, strict: bool) -> None:
    size = sum(shard.stat().st_size for shard in shards_of(folder))
    print(
        f"{folder}: {len(written_names(folder))} files, {index.num_patches} vectors of {index.dim} numbers each in "
        f"{index.dtype}  ({size / 1e6:.1f} MB)"
    )
    broken = folder / UNREADABLE
    if not broken.is_file():
        return
    lines = [json.loads(line) for line in broken.read_text(encoding="utf-8").splitlines()]
    text = f"{len(lines)} files cannot be read; they are listed in {broken}. The first: {lines[0]['reason']}"
    if strict:
        raise ConfigError(text)
    print(text)
