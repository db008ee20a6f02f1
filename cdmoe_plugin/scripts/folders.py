"""Folders that commands read and write."""

from __future__ import annotations

import os
from pathlib import Path

from ..atomic import STAGING


def check_output(folder: str | None, option: str = "output_dir") -> Path:
    """Return a folder to write to, which must be new or empty."""
    if folder is None:
        raise ValueError(f"`--{option}` is needed: a new or empty folder for the condensed checkpoint.")
    path = Path(folder)
    # A run that was killed while it saved may have left an unfinished folder, which the next save removes.
    if path.exists() and (not path.is_dir() or any(not STAGING.fullmatch(inner.name) for inner in path.iterdir())):
        raise ValueError(f"`--{option}` {folder} is not an empty folder; choose another, or empty it.")
    return path


def has_tokenizer(name_or_path: str) -> bool:
    """Return whether a checkpoint comes with a tokenizer; a folder may hold weights alone."""
    return not os.path.isdir(name_or_path) or any(Path(name_or_path).glob("tokenizer*"))
