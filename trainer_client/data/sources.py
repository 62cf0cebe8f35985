"""What ``--data`` names: files, patterns of files, directories, Hugging Face data sets."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer_client.errors import DataError

_PACKED = ("", ".gz", ".xz", ".bz2", ".zst")
_ENDINGS = tuple(
    ending + packed
    for ending in (".jsonl", ".json", ".ndjson", ".txt", ".parquet", ".arrow")
    for packed in _PACKED
)
#: What ``datasets`` writes beside the data, and what is no data beside others'.
_ABOUT = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")


#: A name, or several.
Given = Path | str | Sequence[Path | str]


def files_of(given: Given) -> tuple[Path, ...]:
    """The files of these names, in the order of the names, and sorted within a pattern.

    Raises :class:`DataError` for a name of nothing.
    """
    names = [given] if isinstance(given, (str, Path)) else list(given)
    found = [file for name in names for file in _files(Path(name))]
    if not found:
        raise DataError("no data file is named; say --data FILE")
    return tuple(found)


def _files(name: Path) -> list[Path]:
    if name.is_dir():
        return _of_directory(name)
    if name.exists():
        return [name]
    if glob.has_magic(str(name)):
        matching = sorted(map(Path, glob.glob(str(name), recursive=True)))
        if not matching:
            raise DataError(f"cannot read {name}: no file matches this pattern")
        return [file for each in matching for file in _files(each)]
    raise DataError(f"cannot read {name}: no such file")


def _of_directory(directory: Path) -> list[Path]:
    """The shards of a data set that ``save_to_disk`` wrote, or all files that look like data."""
    if (directory / "dataset_dict.json").exists():
        splits = _names(directory / "dataset_dict.json", "splits")
        if "train" not in splits and len(splits) != 1:
            raise DataError(
                f"{directory} has the splits {', '.join(splits)}; name one: "
                f"{directory / splits[0] if splits else directory}"
            )
        return _of_directory(directory / ("train" if "train" in splits else splits[0]))
    if (directory / "state.json").exists():
        if _json(directory / "state.json").get("_indices_data_files"):
            raise DataError(
                f"{directory} is a selection of rows; write it with save_to_disk of a "
                "newer datasets"
            )
        shards = _names(directory / "state.json", "_data_files")
        return [directory / shard for shard in shards]
    files = sorted(
        file
        for file in directory.rglob("*")
        if file.name.lower().endswith(_ENDINGS)
        and file.name not in _ABOUT
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
    )
    if not files:
        raise DataError(f"{directory} has no data file in it ({', '.join(_ENDINGS[::5])}, ...)")
    return files


def _names(path: Path, key: str) -> list[str]:
    said = _json(path).get(key)
    listed = said if isinstance(said, list) else [None]
    names = [each.get("filename") if isinstance(each, dict) else each for each in listed]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} has no list {key!r}; it was not written by datasets")
    return [str(name) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    return said if isinstance(said, dict) else {}
