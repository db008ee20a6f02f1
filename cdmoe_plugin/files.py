"""JSON files that are there whole or not at all, and are read without trusting what they hold."""

from __future__ import annotations

import glob
import json
import os
import platform
from pathlib import Path
from typing import Any

from .saving_cdmoe import to_disk


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Writes a JSON file; an existing one is replaced at once or not at all, also if the machine goes down.

    A process that is killed meanwhile leaves a file ".<name>.writing-<machine>-<process>", which the next one on the
    same machine removes.

    Raises:
        OSError: if it can't be written, on a full disk for instance. What was there before is there still.
        ValueError: if `values` hold NaN or infinity, which JSON lacks.
    """
    path = Path(path)
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
    prefix = f".{path.name}.writing-{platform.node()}-"
    _remove_leftovers(path.parent, prefix)
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: could not be written, and is as it was", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    to_disk(path.parent)


def read_json(path: str | os.PathLike) -> Any:
    """Parses a JSON file.

    Raises:
        ValueError: if it is no JSON (NaN and Infinity, which JSON lacks, included).
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it contains {constant}")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _remove_leftovers(folder: Path, prefix: str) -> None:
    if os.name != "posix":  # elsewhere, `os.kill` does not ask but kill
        return
    for leftover in folder.glob(f"{glob.escape(prefix)}*"):
        process = leftover.name.removeprefix(prefix)
        if process.isdecimal() and not _is_running(int(process)):
            leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True
