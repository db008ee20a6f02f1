"""Data sources: a name on the hub, or a local file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checks import is_out_of_memory

# The paper's data, for calibration and for language modelling: the first shard of C4's English training split.
C4_NAME = "allenai/c4"
C4_FILES = "en/c4-train.00000-of-01024.json.gz"
# Endings of local files, and the loader of `datasets` for each.
TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TEXTS = {".txt": "text", **TABLES}


def is_local(source: str | os.PathLike, formats: Mapping[str, str]) -> bool:
    """Return whether a source is a local path: it exists, or has the ending of a supported file."""
    return Path(source).exists() or Path(source).suffix in formats


def open_file(path: Path, what: str, formats: Mapping[str, str]) -> Any:
    """Open a local file as a `Dataset`, or return None if it is empty.

    Args:
        path (`Path`): The file.
        what (`str`): Its purpose in error messages, such as "calibration".
        formats (`Mapping[str, str]`): The supported endings, and the loader of `datasets` for each.

    Raises:
        ValueError: if the file does not exist, has another ending or can't be read.
    """
    if not path.is_file():
        raise ValueError(f"The {what} file {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    if path.suffix not in formats:
        raise ValueError(f"The {what} file {path} should end in one of {', '.join(formats)}.")
    if path.stat().st_size == 0:
        return None
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(formats[path.suffix], data_files=str(path), split="train")
    except (DatasetsError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"The {what} file {path} can't be read: {error.__cause__ or error}") from error


def open_hub(name: str, what: str, advice: str, **kwargs: Any) -> Any:
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
        return load_dataset(name, **{"split": "train", **kwargs})
    except (DatasetsError, HTTPError, ImportError, OSError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"The {what} data {name!r} is not a local file and can't be opened as a dataset on the hub ({error}). "
            f"{advice}"
        ) from error
