"""Features of images or sounds on disk: written once, in shards, so that training needs no encoder.

P patches, D width
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_alignment.data.multimodal.media import UnreadableMediaError
from lit_alignment.data.sources.content import content_hash
from lit_alignment.errors import CacheError, CheckpointError, ConfigError
from lit_alignment.files import config_in

INDEX = "features.json"
UNREADABLE = "unreadable.jsonl"
SHARD = re.compile(r"features-r(\d+)-(\d+)\.safetensors")
FORMAT = 1


@dataclass(frozen=True)
class CacheIndex:
    """What made a cache.

    Args:
        modality: `image` or `audio`.
        encoders: Settings and hash of each encoder.
        num_patches: P.
        dim: D, of all encoders together.
        dtype: Precision of the features.
        root: Folder that the files' names are relative to.
        complete: Whether all files have been encoded.
        format: Version of this form.
    """

    modality: str
    encoders: list[dict[str, Any]]
    num_patches: int
    dim: int
    dtype: str
    root: str
    complete: bool = False
    format: int = FORMAT


class FeatureCache:
    """Features by file, memory-mapped. A `MediaReader`.

    Args:
        path: A folder that `lit-alignment preprocess` has written, or a single safetensors file with a tensor
            [P, D] under the name of each image, as turbo-alignment wrote.
        index: What should have made it.
    """

    def __init__(self, path: str | Path, index: CacheIndex) -> None:
        """Read the names of all features; the features themselves stay on disk.

        Raises:
            FileNotFoundError: If there is no cache.
            ConfigError: If another encoder made it.
            CacheError: If it is damaged.
        """
        self.path = Path(path).expanduser()
        self.root: Path | None = None
        self._places: dict[str, Path] = {}
        self._checksums: dict[str, str] = {}  # of features, where the version that wrote them has noted it
        self._compared: set[str] = set()
        self._shape = [index.num_patches, index.dim]
        if self.path.is_file():
            self._note(self.path)
            if not self._places:
                raise ConfigError(f"{self.path}: the cache holds nothing. Make it again.")
            self._tensor(next(iter(self._places)))
            return
        found = read_index(self.path)
        check_same(found, index, self.path)
        if not found.complete:
            raise ConfigError(f"{self.path}: the cache is not complete. Run lit-alignment preprocess again.")
        self.root = Path(found.root)
        for shard in shards_of(self.path):
            self._note(shard)

    def _note(self, shard: Path) -> None:
        names, checksums = _names(shard)
        self._places |= dict.fromkeys(names, shard)
        self._checksums |= checksums

    def __len__(self) -> int:
        """Number of files."""
        return len(self._places)

    def decides_reading(self) -> str:
        """Where the features are."""
        return str(self.path)

    def check(self, path: str) -> None:
        """Make sure that a file has features."""
        self._name(path)

    def fingerprint(self, path: str, folder: Path) -> str:
        """A hash of the features of a file."""
        name = self._name(path)
        return self._checksums.get(name) or content_hash(self._places[name], folder)

    def read(self, path: str) -> list[Tensor]:
        """The features of a file, [P, D].

        Raises:
            CacheError: If they are damaged, or none of the encoder's.
        """
        return [self._tensor(self._name(path))]

    def _name(self, path: str) -> str:
        """The name under which a file's features are kept."""
        names = [path, Path(path).name] if self.root is None else [relative_name(Path(path), self.root)]
        for name in names:
            if name in self._places:
                return name
        raise UnreadableMediaError(f"{path}: not in the feature cache {self.path} (as '{names[0]}')")

    def _tensor(self, name: str) -> Tensor:
        shard = self._places[name]
        try:
            with safe_open(shard, "pt") as file:
                found: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{shard}: damaged ({error}). {_ENCODE}") from error
        features = found[0] if found.ndim == 3 and len(found) == 1 else found
        if [*features.shape] != self._shape or not features.is_floating_point():
            made = f"{[*features.shape]} in {features.dtype}"
            raise CacheError(
                f"{shard}: the features of '{name}' are {made}, and the encoder makes {self._shape}. {_ENCODE}"
            )
        if name not in self._compared and self._checksums.get(name, _checksum(found)) != _checksum(found):
            raise CacheError(f"{shard}: damaged (the features of '{name}' have another checksum). {_ENCODE}")
        self._compared.add(name)
        return features


class ShardWriter:
    """Writes features in shards; what is written survives a kill, and is not encoded again.

    Args:
        folder: The cache.
        rank: This process, which writes files of its own.
        per_shard: Files in one shard.
    """

    def __init__(self, folder: Path, rank: int, per_shard: int) -> None:
        """Number on from the shards that are there."""
        self.folder, self.rank, self.per_shard = folder, rank, per_shard
        numbers = [int(found[2]) for shard in shards_of(folder) if (found := SHARD.fullmatch(shard.name))]
        self._next = max(numbers, default=-1) + 1
        self._waiting: dict[str, Tensor] = {}

    def add(self, name: str, features: Tensor) -> None:
        """Take the features of one file, [P, D]."""
        self._waiting[name] = features.contiguous().cpu()
        if len(self._waiting) >= self.per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            CheckpointError: If the disk is full.
        """
        if not self._waiting:
            return
        target = self.folder / f"features-r{self.rank:03d}-{self._next:06d}.safetensors"
        fresh = target.with_name(f".{target.name}.partial")
        try:
            save_file(self._waiting, fresh, {name: _checksum(features) for name, features in self._waiting.items()})
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(fresh, target)
        except (OSError, SafetensorError) as error:
            fresh.unlink(missing_ok=True)
            raise CheckpointError(
                f"{target}: cannot write features ({error}). Free the disk and run it again."
            ) from error
        self._next += 1
        self._waiting = {}


def shards_of(folder: Path) -> list[Path]:
    """The complete shards of a cache."""
    return sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name)) if folder.is_dir() else []


def written_names(folder: Path) -> set[str]:
    """Names of the files whose features are there."""
    return {name for shard in shards_of(folder) for name in _names(shard)[0]}


def relative_name(path: Path, root: Path) -> str:
    """A file's name in a cache: its path below the root, or from the root of the disk."""
    absolute = Path(os.path.abspath(path))
    return (absolute.relative_to(root) if absolute.is_relative_to(root) else absolute).as_posix()


def _names(shard: Path) -> tuple[list[str], dict[str, str]]:
    """Names in a shard, and checksums of their features, read from its header alone."""
    try:
        with shard.open("rb") as file:
            header = dict(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
        checksums = dict(header.pop("__metadata__", {}))
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise CacheError(f"{shard}: not a safetensors file ({error}). {_ENCODE}") from error
    return list(header), checksums


def _checksum(features: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(features.contiguous().view(torch.uint8).numpy().data)


_ENCODE = "Delete it, and run lit-alignment preprocess again: what is encoded elsewhere is kept."


def read_index(folder: Path) -> CacheIndex:
    """The index of a cache.

    Raises:
        FileNotFoundError: If there is none.
        ConfigError: If it is no JSON, or of another version.
        CheckpointError: If it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no feature cache here (no {INDEX}; looked from {Path.cwd()}). "
            "Make it: lit-alignment preprocess --config FILE."
        )
    found = config_in(path, CacheIndex, "an index of a feature cache")
    if found.format != FORMAT:
        raise ConfigError(f"{path}: format {found.format} is not {FORMAT}. Make the cache again.")
    return found


def write_index(folder: Path, index: CacheIndex) -> None:
    """Write the index whole or not at all."""
    fresh = folder / f".{INDEX}.new"
    fresh.write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, folder / INDEX)


def check_same(found: CacheIndex, wanted: CacheIndex, folder: Path) -> None:
    """Refuse a cache that another encoder, or another of its layers, has made.

    Raises:
        ConfigError: Saying what differs.
    """
    if len(found.encoders) != len(wanted.encoders) or found.modality != wanted.modality:
        raise ConfigError(
            f"{folder}: made of {len(found.encoders)} encoders of {found.modality}, and the model has "
            f"{len(wanted.encoders)} of {wanted.modality}. {_AGAIN}"
        )
    for number, (made, ours) in enumerate(zip(found.encoders, wanted.encoders, strict=True)):
        changed = next((name for name in ours if made.get(name) != ours[name]), None)
        if changed is not None:
            raise ConfigError(
                f"{folder}: another encoder made this cache: encoders[{number}] had {changed}: {made.get(changed)!r}, "
                f"and the model's has {ours[changed]!r}. {_AGAIN}"
            )
    sizes = [[index.num_patches, index.dim] for index in (found, wanted)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{folder}: holds features of {sizes[0]}, and the model's encoders make {sizes[1]}. {_AGAIN}")


_AGAIN = "Make it again: lit-alignment preprocess --overwrite, or choose another model's cache."


def stored(features: Tensor, dtype: str) -> Tensor:
    """Features in the precision of a cache."""
    kind: torch.dtype = getattr(torch, dtype)
    return features.to(kind)
