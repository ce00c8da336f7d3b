"""Read checkpoints that anybody may have written: weights and plain values, and no code of theirs is run."""

import io
import os
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import metadata as stored
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout, safe_globals

from lit_alignment.errors import CheckpointError, require
from lit_alignment.files import inside

IN_PYTHON: Any = pickle._Unpickler
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # what torch.load asks before its own arguments
# What the description of shards is made of; names are compared whole, so no attribute of these can be reached.
DESCRIPTION: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            stored.Metadata,
            stored.MetadataIndex,
            stored.StorageMeta,
            stored.TensorStorageMetadata,
            stored.BytesStorageMetadata,
            stored.ChunkStorageMetadata,
            stored.TensorProperties,
            stored._MEM_FORMAT_ENCODING,
            _StorageInfo,
            OrderedDict,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    # Where it was written, which nobody asks; the second is its name in Python 3.13.
    **{(module, "PosixPath"): lambda *parts: "/".join(parts) for module in ("pathlib", "pathlib._local")},
    **{("torch", name): kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)},
}


def read_plain(path: Path) -> dict[str, Any]:
    """A file of `torch.save` that holds a dict of weights and plain values.

    Raises:
        CheckpointError: If it is damaged, or holds anything else.
    """
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader happens to
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, and a checkpoint is a dict. Use another one.")
    return content


def check_archive(path: Path) -> None:
    """Compare a file of `torch.save` with its checksums, which torch writes and does not look at.

    Raises:
        ValueError: If it is damaged, or compressed, which torch writes none: a small file could hold any amount.
    """
    if not path.is_file():
        raise (
            FileNotFoundError(f"{path}: no such checkpoint (looked from {Path.cwd()}). Check the path.")
            if not path.exists()
            else ValueError("it is no file")
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum of {broken}")


def unreadable(path: Path, error: BaseException) -> CheckpointError:
    """What to say of a checkpoint that cannot be read."""
    text = str(error).strip()
    named = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|names) ([\w.]+)", text)
    if named is not None:
        return CheckpointError(
            f"{path}: names {named[1]}, and a checkpoint holds weights and plain values alone: nothing in it is run. "
            "Use one that lit_alignment has written."
        )
    if text.startswith("Weights only load failed"):  # torch's advice is to load it all the same
        return CheckpointError(f"{path}: no checkpoint, or a damaged one. Give one that lit_alignment has written.")
    reason = (text.splitlines() or [type(error).__name__])[0]
    if path.is_file() and path.stat().st_size == 0:
        reason = "it is empty"
    return CheckpointError(f"{path}: cannot read the checkpoint ({reason}). It is damaged; use an earlier one.")


def _fields(kind: Any) -> set[str]:
    return {each.name for each in fields(kind)} if is_dataclass(kind) else set()


class _Description(IN_PYTHON):  # type: ignore[misc]
    """Reads the description of shards, which torch itself reads with plain pickle.

    In Python, since what C gives a state to can be anything that it has found, a class too.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(IN_PYTHON.dispatch)

    def load_build(self) -> None:
        """Give a state to an instance of a dataclass, by its fields alone.

        Raises:
            UnpicklingError: If it is anything else.
        """
        state, made = self.stack[-1], self.stack[-2]
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        named = all(part is None or (isinstance(part, dict) and part.keys() <= _fields(type(made))) for part in parts)
        if isinstance(made, type) or not (isinstance(made, stored.TensorProperties) or (named and _fields(type(made)))):
            raise pickle.UnpicklingError(f"it changes {made!r:.100}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """One of the few names that there can be.

        Raises:
            UnpicklingError: At any other.
        """
        try:
            return DESCRIPTION[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def _check_tensors(folder: Path, description: stored.Metadata) -> None:
    """Refuse tensors that lack chunks, or hold more than the files do: torch would leave memory as it is."""
    total = 0
    for name, tensor in description.state_dict_metadata.items():
        if not isinstance(tensor, stored.TensorStorageMetadata):
            continue
        places, held = {tuple(chunk.offsets) for chunk in tensor.chunks}, sum(c.sizes.numel() for c in tensor.chunks)
        if len(places) < len(tensor.chunks) or held != tensor.size.numel():
            raise ValueError(f"parts of {name} are missing")
        total += tensor.size.numel() * tensor.properties.dtype.itemsize
    size = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    if total > size:
        raise ValueError(f"it describes {total} bytes, and the shards have {size}")


class ShardReader(FileSystemReader):
    """Reads shards whose description names nothing outside of their folder, and is read once."""

    description: stored.Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> stored.Metadata:
        """The description of the shards.

        Raises:
            CheckpointError: If it is damaged, or names anything but weights, values and files of the folder.
        """
        if self.description is not None:
            return self.description
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                found = _Description(file).load()
            if not isinstance(found, stored.Metadata):
                raise TypeError(f"it describes a {type(found).__name__}")
            for name in {place.relative_path for place in found.storage_data.values()}:
                inside(Path(self.path), name)
            _check_tensors(Path(self.path), found)
            keys = [key for keys in (found.planner_data or {}).values() for key in keys if isinstance(key, int)]
            if max(keys, default=0) > len(found.state_dict_metadata):  # torch makes lists that long
                raise ValueError(f"it has a list of {max(keys)} values")
        except (FileNotFoundError, CheckpointError):
            raise
        except Exception as error:  # a damaged pickle raises whatever its reader happens to
            raise unreadable(path, error) from error
        found.storage_meta = found.storage_meta or stored.StorageMeta()
        found.storage_meta.load_id = self.load_id
        self.description = found
        return found


class ShardPlanner(DefaultLoadPlanner):
    """Reads the values beside the tensors as plain values; torch itself reads them with plain pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value where it belongs."""
        name, content = read_item.dest_index.fqn, torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content


class WholePlanner(ShardPlanner, _EmptyStateDictLoadPlanner):
    """The same, for a state that is made from the description.

    Args:
        keys: Which of its parts; None takes all.
    """

    def __init__(self, keys: set[str] | None = None) -> None:
        """Nothing is read yet."""
        super().__init__(keys)  # type: ignore[no-untyped-call]


def is_deepspeed(path: Path) -> bool:
    """Whether a path is a checkpoint of DeepSpeed's, which writes the name of its newest part last."""
    return (path / "latest").is_file()


def read_deepspeed(path: Path) -> dict[str, Any]:
    """A checkpoint of DeepSpeed's with whole weights and no optimizer.

    Raises:
        ConfigError: Without the package.
        CheckpointError: If it is damaged, or holds more than weights and plain values.
    """
    require("deepspeed", "deepspeed")
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    with tempfile.TemporaryDirectory() as folder, only_plain_values(path):
        return dict(convert_zero_checkpoint_to_fp32_state_dict(path, Path(folder) / "whole.ckpt"))


@contextmanager
def only_plain_values(path: Path) -> Iterator[None]:
    """Have DeepSpeed's and Lightning's readers of a DeepSpeed folder take weights and plain values alone.

    Args:
        path: The folder, whose file `latest` names the one with the parts.

    Raises:
        ConfigError: Without the package.
        CheckpointError: If it names anything else.
    """
    require("deepspeed", "deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        inside(path, (path / "latest").read_text().strip())
        with patch.dict(os.environ, {FORCE: "1"}), safe_globals(allowed):
            yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged part raises whatever its reader happens to
        raise unreadable(path, error) from error
