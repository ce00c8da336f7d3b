"""`lit-alignment preprocess`: images or sounds -> a cache of features, so that training needs no encoder."""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lit_alignment.callbacks.features import FeatureWriter
from lit_alignment.data.features import FileDataModule
from lit_alignment.data.multimodal.feature_cache import (
    INDEX,
    UNREADABLE,
    CacheIndex,
    check_same,
    read_index,
    relative_name,
    shards_of,
    write_index,
    written_names,
)
from lit_alignment.data.multimodal.media import MODALITIES, files_of, list_files
from lit_alignment.data.vlm import VLMDataModule
from lit_alignment.errors import ConfigError
from lit_alignment.models.multimodal.modality import MediaShape, ModalityConfig
from lit_alignment.models.multimodal.reading import cache_index, file_reader
from lit_alignment.models.multimodal.vision import EncoderConfig
from lit_alignment.modules.features import FeatureModule
from lit_alignment.modules.vlm import VLMModule
from lit_alignment.trainer_cli import ToolCLI, build_for_tool


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
    parser = argparse.ArgumentParser(
        prog="lit-alignment preprocess",
        description="Encode the images (or sounds) of a configuration once, with a Trainer on its devices. Set "
        "model.image.cache to the folder afterwards. A killed run goes on where it stopped. Any setting of the "
        "configuration can be given too.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--files", type=Path, help="folder to read, and those below (default: the data's files)")
    parser.add_argument("--encoder", help="an encoder, with --files, in place of a configuration")
    parser.add_argument("--layer", type=int, default=-2, help="its hidden state (default: -2)")
    parser.add_argument("--keep-cls", action="store_true", help="also its class token's vector")
    parser.add_argument("--modality", choices=["image", "audio"], default="image")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=64, help="files to encode together (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read ahead (default: 0)")
    parser.add_argument("--per-shard", type=int, default=512, help="files in one shard (default: 512)")
    parser.add_argument("--strict", action="store_true", help="fail if a file cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that is there")
    options, rest = parser.parse_known_args(arguments)
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
    if not isinstance(cli.model, VLMModule) or options.modality not in cli.model.shapes:
        raise ConfigError(f"the configuration has no model.{options.modality}: give that of a VLMModule.")
    shape, folder = cli.model.shapes[options.modality], options.files
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
        print(f"{len(done)} files are encoded in {folder}; going on.")
    trainer = Trainer(
        **devices,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[FeatureWriter(folder, index, options.per_shard)],
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
