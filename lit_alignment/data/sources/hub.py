"""Data sets of the hub, and folders in its layout, by configuration and split."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.paths import look_for_hub

CARD = "README.md"


@dataclass(frozen=True)
class HubRows:
    """A data set as Arrow batches.

    Args:
        header: Names of its columns; none where there are no rows.
        batches: Its rows.
    """

    header: Collection[str]
    batches: Iterator[Any]


def is_hub_layout(folder: Path, subset: str | None, split: str | None) -> bool:
    """Whether a folder is to be read as the hub would: by its card, or by the names of folders and files.

    Args:
        folder: Of data files.
        subset: A configuration that is asked for.
        split: A split that is asked for.
    """
    if (folder / "state.json").is_file():
        return False
    declares = (folder / CARD).is_file() and "configs:" in (folder / CARD).read_text(encoding="utf-8", errors="replace")
    return declares or subset is not None or split is not None


def hub_files(folder: Path, subset: str | None, split: str | None) -> list[Path]:
    """The files of a split of a folder in the layout of the hub.

    Args:
        folder: With a card that lists configurations, or with files whose names or folders say the split.
        subset: The configuration, or a folder in it; None where there is one configuration.
        split: `train` by default.

    Raises:
        ConfigError: If there is no such configuration or split, with those that there are.
    """
    import datasets

    try:
        if subset is not None and (folder / subset).is_dir():
            builder = datasets.load_dataset_builder(str(folder), data_dir=subset)
        else:
            builder = datasets.load_dataset_builder(str(folder), subset)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{folder}: {_reason(error)} (subset is {subset or 'not given'}).") from error
    files = builder.config.data_files or {}
    wanted = split or "train"
    if wanted not in files:
        listed = ", ".join(map(str, files)) or "none"
        raise ConfigError(f"{folder}: no split is named '{wanted}' (there are: {listed}). Set the source's 'split'.")
    return [Path(file) for file in files[wanted]]


def hub_rows(path: str, subset: str | None, split: str | None, streaming: bool = False) -> HubRows:
    """The rows of a data set on the hub.

    Args:
        path: Its name.
        subset: The configuration, or a folder in it.
        split: `train` by default.
        streaming: Read over the network as it goes, and keep nothing on the disk.

    Raises:
        ConfigError: If the hub gives none.
    """
    import datasets

    reason = look_for_hub()
    options: dict[str, Any] = {"split": split or "train"} | ({"streaming": True} if streaming else {})
    try:
        rows = _load(path, subset, options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if reason and not isinstance(error, ValueError):  # which says what is wrong with a data set that is there
            raise ConfigError(
                f"{path}: no file or folder (looked from {Path.cwd()}), not in the cache, and {reason}. Check "
                "data's 'path', or set HF_ENDPOINT to a mirror."
            ) from error
        raise ConfigError(
            f"{path}: neither a local file nor a data set that the hub gives "
            f"({type(error).__name__}: {_reason(error)}). Check data's 'path', 'subset' and 'split'."
        ) from error
    batches = iter(rows.with_format("arrow").iter(256))
    first = next(batches, None)  # a stream knows its columns by its rows alone
    return HubRows([], batches) if first is None else HubRows(first.column_names, chain([first], batches))


def _load(path: str, subset: str | None, options: dict[str, Any]) -> Any:
    """A data set; a subset that is none of its configurations may be a folder, as the parts of HH are."""
    import datasets

    try:
        return datasets.load_dataset(path, subset, **options)
    except ValueError as error:
        if subset is None or "BuilderConfig" not in str(error):
            raise
        try:
            return datasets.load_dataset(path, data_dir=subset, **options)
        except (OSError, datasets.exceptions.DatasetsError):
            raise error from None


def _reason(error: Exception) -> str:
    """The first lines of a library's message, in one."""
    return " ".join(str(error).split())[:300].rstrip(".")
