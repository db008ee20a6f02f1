"""The files that hold a plan: its own, the config of a condensed checkpoint, or that of a condense adapter."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .atomic import read_json
from .checks import read_mapping

PLAN_FILE = "condense_plan.json"
ADAPTER_FILE = "adapter_config.json"  # of a condense adapter, with its plan


def plan_file(path: Path) -> tuple[Path, Callable[[Path], Any]]:
    """Find the file of a plan, and the function that reads the plan's values from it.

    Args:
        path (`Path`): A file, or a folder with one of the three kinds of files.
    """
    if not path.is_dir():
        return path, read_json
    # Without its own file, the plan is in the config of a checkpoint saved without this package, or an adapter.
    files = {PLAN_FILE: read_json, "config.json": _read_from_config, ADAPTER_FILE: _read_from_adapter}
    name = next((name for name in files if (path / name).exists()), PLAN_FILE)
    return path / name, files[name]


def _read_from_config(path: Path) -> Any:
    """Read the plan from a condensed checkpoint's config.json, where the code beside its weights writes it."""
    condense_config = read_mapping(read_json(path), "config").get("condense_config")
    plan = None if condense_config is None else read_mapping(condense_config, "condense_config").get("plan")
    if plan is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.with_name(PLAN_FILE)))
    return plan


def _read_from_adapter(path: Path) -> Any:
    """Read the plan of a condense adapter."""
    config = read_mapping(read_json(path), "config")
    if config.get("plan") is None:
        raise ValueError(f"it has no `plan`: it is the config of an adapter of type {config.get('peft_type')!r}.")
    return config["plan"]
