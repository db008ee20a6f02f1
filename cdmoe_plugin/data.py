"""Data sources: a name on the hub, a local file or a folder of files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checks import is_out_of_memory

# The paper's data, for calibration and for language modelling: the first shard of C4's English training split.
C4_NAME = "allenai/c4"
C4_FILES = "en/c4-train.00000-of-01024.json.gz"
# Endings of local files, and the loader of `datasets` for each.
TABLES = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
TEXTS = {".txt": "text", **TABLES}
# Second endings: `datasets` decompresses these by itself.
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_OPTIONS: dict[str, dict[str, Any]] = {".tsv": {"sep": "\t"}}


def is_local(source: str | os.PathLike, formats: Mapping[str, str]) -> bool:
    """Return whether a source is a local path: it exists, or has the ending of a supported file."""
    # Not `Path.exists`, which raises an error if the name is too long for a path.
    return os.path.exists(source) or ending(source, formats) is not None


def ending(path: str | os.PathLike, formats: Mapping[str, str]) -> str | None:
    """Return the supported ending of a file's name, such as ".jsonl" for "texts.jsonl.gz", or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in formats else None


def split_name(source: str) -> tuple[str, str | None, str | None]:
    """Split `name:config@split` into a dataset's name, its config and its split; the latter two are optional.

    Raises:
        ValueError: if the name, the config or the split is empty.
    """
    if os.path.exists(source):
        return source, None, None
    name, at, split = source.partition("@")
    colon, config = "", ""
    if not os.path.exists(name) and not re.match(r"[A-Za-z]:[\\/]", name):  # the drive of a Windows path
        name, colon, config = name.partition(":")
    if not name.strip() or (at and not split) or (colon and not config):
        raise ValueError(
            f"A dataset is named by `name`, `name:config`, `name@split` or `name:config@split`, but not {source!r}."
        )
    return name, config or None, split or None


def open_source(
    source: str | os.PathLike, what: str, formats: Mapping[str, str], advice: str, streaming: bool = False
) -> Any:
    """Open a local file or folder, or a dataset on the hub, or return None if the file is empty.

    Args:
        source (`str` or `os.PathLike`): Path, or name on the hub; `name:config@split` selects a config and a split.
        what (`str`): Its purpose in error messages, such as "calibration".
        formats (`Mapping[str, str]`): The supported endings of files, and the loader of `datasets` for each.
        advice (`str`): Last sentence of the error message for a dataset on the hub.
        streaming (`bool`, defaults to `False`): Read a dataset on the hub while it is downloaded.

    Raises:
        ValueError: if the source does not exist, has another ending or can't be read.
    """
    if "://" in os.fspath(source):
        raise ValueError(f"The {what} data {source} is a URL: download it first, or name a dataset on the hub.")
    name, config, split = split_name(os.fspath(source))
    if not is_local(name, formats):
        # Slices such as train[:1000] can't be streamed.
        options: dict[str, Any] = {"streaming": True} if streaming and "[" not in (split or "") else {}
        return open_hub(name, what, advice, **({"name": config} if config else {}), split=split or "train", **options)
    if config:
        raise ValueError(f"The {what} data {name} is a local path, which has no config {config!r}.")
    if os.path.isdir(name):
        return open_folder(Path(name), what, formats, split or "train")
    return open_file(Path(name), what, formats, split or "train")


def open_file(path: Path, what: str, formats: Mapping[str, str], split: str = "train") -> Any:
    """Open a local file as a `Dataset`, or return None if it is empty.

    Args:
        path (`Path`): The file, which may be compressed.
        what (`str`): Its purpose in error messages, such as "calibration".
        formats (`Mapping[str, str]`): The supported endings, and the loader of `datasets` for each.
        split (`str`, defaults to `"train"`): All of the file, or a slice such as "train[:1000]".

    Raises:
        ValueError: if the file does not exist, has another ending or can't be read.
    """
    if not path.is_file():
        raise ValueError(f"The {what} file {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    found = ending(path, formats)
    if found is None:
        raise ValueError(
            f"The {what} file {path} should end in one of {', '.join(formats)}, or such an ending followed by one of "
            f"{', '.join(COMPRESSED)}."
        )
    if path.stat().st_size == 0:
        return None
    # A file's name may have characters that `datasets` would take for a pattern.
    return _load(formats[found], path, what, data_files=glob.escape(str(path)), split=split, **_OPTIONS.get(found, {}))


def open_folder(path: Path, what: str, formats: Mapping[str, str], split: str = "train") -> Any:
    """Open a folder of files of one kind, or a dataset saved by `save_to_disk`.

    Args:
        path (`Path`): The folder.
        what (`str`), formats (`Mapping[str, str]`): As in `open_file`.
        split (`str`, defaults to `"train"`): The split; `datasets` recognises splits by the names of files and folders.

    Raises:
        ValueError: if the folder has no supported files, files of several kinds, or no such split, or can't be read.
    """
    from datasets import load_from_disk

    if (path / "state.json").is_file():
        if split != "train":
            raise ValueError(f"The {what} data {path} is one dataset, which has no split {split!r}.")
        return _reading(path, what, load_from_disk, str(path))
    if (path / "dataset_dict.json").is_file():
        splits = _reading(path, what, load_from_disk, str(path))
        if split not in splits:
            raise ValueError(f"The {what} data {path} has the splits {list(splits)}: choose one by `{path}@split`.")
        return splits[split]
    kinds = {ending(file, formats) for file in path.rglob("*") if file.is_file()} - {None}
    if not kinds:
        raise ValueError(f"The {what} data {path} is a folder without files that end in one of {', '.join(formats)}.")
    if len(kinds) > 1:
        raise ValueError(
            f"The {what} data {path} is a folder of files of several kinds, {', '.join(sorted(map(str, kinds)))}: name "
            "one of the files, or a folder whose files are of one kind."
        )
    return _load(str(path), path, what, split=split)


def _load(loader: str, path: Path, what: str, **kwargs: Any) -> Any:
    from datasets import load_dataset
    from datasets.arrow_writer import SchemaInferenceError

    try:
        return _reading(path, what, load_dataset, loader, **kwargs)
    except StopIteration:  # raised for JSON without a row (seen with datasets 5.2)
        return None
    except ValueError as error:
        cause = error.__cause__
        if cause is not None and isinstance(cause.__cause__, SchemaInferenceError):  # a compressed file without content
            return None
        if "corresponds to no data" in str(cause):  # a table without rows
            return None
        raise


def _reading(path: Path, what: str, read: Any, *args: Any, **kwargs: Any) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return read(*args, **kwargs)
    except (DatasetsError, ImportError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"The {what} file {path} can't be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    reason = str(error.__cause__ or error)
    if "zstd not supported" in reason:
        reason += ". It is compressed with Zstandard: install the package `zstandard`"
    return reason


def open_hub(name: str, what: str, advice: str, /, **kwargs: Any) -> Any:
    """Open a dataset on the hub, by default its split "train".

    Args:
        name (`str`): Name of the dataset.
        what (`str`): Its purpose in error messages, such as "calibration".
        advice (`str`): Last sentence of the error message.
        **kwargs: Passed to `datasets.load_dataset`.

    Raises:
        ValueError: if the hub can't be reached or has no such dataset.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # the type of failed connections

    try:
        dataset = load_dataset(name, **{"split": "train", **kwargs})
        if kwargs.get("streaming") and getattr(dataset, "column_names", ()) is None:
            next(iter(dataset), None)  # files that can't be read raise an error here, where it is explained
        return dataset
    except (DatasetsError, HTTPError, ImportError, OSError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"The {what} data {name!r} is not a local file and can't be opened as a dataset on the hub "
            f"({_reason(error)}). A config and a split are named by `name:config@split`. {advice}"
        ) from error
