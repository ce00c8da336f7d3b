"""Find the newest checkpoint of a run that can be read."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment.checkpoints.reading import ShardReader, check_archive, is_deepspeed, unreadable
from lit_alignment.checkpoints.sharded import OLD, found_path, is_sharded, read_rest
from lit_alignment.errors import CheckpointError

SUFFIX = ".ckpt"


def newest_checkpoint(trainer: Trainer, stem: str = "*", only: Path | None = None) -> Path | None:
    """The newest readable checkpoint where this run, or an earlier one of the same name, keeps them; None without any.

    Damaged ones are passed over, which is said.

    Args:
        trainer: Its callbacks and loggers say where.
        stem: Pattern of their names, without `.ckpt`.
        only: One folder, where this is not to be any of theirs.
    """
    for path in _by_age(folders(trainer) if only is None else [only], stem):
        try:
            check(path)
        except (CheckpointError, OSError) as error:
            print(f"warning: passed over: {error}", flush=True)
        else:
            return path
    return None


def earlier_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint of earlier runs of the same name, readable or not; None without any."""
    return next(iter(_by_age(folders(trainer), "*")), None)


def _by_age(places: list[Path], stem: str) -> list[Path]:
    """Checkpoints in some folders, the newest first."""
    # A link can point to nothing: the run was killed between a removal and the next link.
    found = [path for folder in places for path in folder.glob(f"{stem}{SUFFIX}") if path.exists()]
    for old in (path for folder in places for path in folder.glob(f".{stem}{SUFFIX}{OLD}")):
        if found_path(old.with_name(old.name.removeprefix(".").removesuffix(OLD))) == old:
            found.append(old)  # killed between the two renames of a save
    return sorted(found, key=lambda each: each.stat().st_mtime_ns, reverse=True)


def folders(trainer: Trainer) -> list[Path]:
    """Where checkpoints of this run and of earlier ones stand."""
    given = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    if given:
        return [Path(folder) for folder in given]
    places = [Path(logger.save_dir) / str(logger.name) for logger in trainer.loggers if logger.save_dir]
    runs = [run for place in places for run in sorted(place.glob("*")) if (run / "checkpoints").is_dir()]
    return [run / "checkpoints" for run in runs] or [Path(trainer.default_root_dir) / "checkpoints"]


def check(path: Path) -> None:
    """See that a checkpoint has its checksums, or all of its shards.

    Raises:
        CheckpointError: If it is damaged.
    """
    if not is_sharded(path):
        if is_deepspeed(path):  # appears under its name when it is whole
            return
        if path.is_dir():
            raise CheckpointError(f"{path}: no whole checkpoint: the run ended while it was written.")
        try:
            check_archive(path)
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged directory of the archive raises whatever its reader happens to
            raise unreadable(path, error) from error
        if not isinstance(content, dict) or "state_dict" not in content:
            raise CheckpointError(f"{path}: no checkpoint.")
        return
    read_rest(path)
    for place in ShardReader(path).read_metadata().storage_data.values():
        shard = path / place.relative_path
        size = shard.stat().st_size if shard.is_file() else 0
        if size < place.offset + place.length:
            raise CheckpointError(f"{shard}: has {size} bytes, and {place.offset + place.length} are needed.")
