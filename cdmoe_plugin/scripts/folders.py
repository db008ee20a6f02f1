"""Folders that commands read and write."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..atomic import STAGING
from ..plan_files import PLAN_FILE
from ..sizes import format_bytes


def check_output(folder: str | None, option: str = "output_dir") -> Path:
    """Return a folder to write to, which must be new or empty.

    Raises:
        ValueError: naming the option, if the folder is not empty or can't be written to.
    """
    if folder is None:
        raise ValueError(f"`--{option}` is needed: a new or empty folder for the condensed checkpoint.")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`--{option}` {folder} is a file, not a folder; choose another.")
    check_writable(path, f"`--{option}` {folder}")
    # A run that was killed while it saved may have left an unfinished folder, which the next save removes.
    if path.exists() and any(not STAGING.fullmatch(inner.name) for inner in path.iterdir()):
        raise ValueError(f"`--{option}` {folder} is not an empty folder; choose another, or empty it.")
    return path


def check_writable(folder: Path, what: str) -> None:
    """Check that files can be made in a folder, which need not exist yet.

    Raises:
        ValueError: beginning with `what`, with the system's reason.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise ValueError(f"{what} can't be written to: {error.strerror}.") from error


def check_space(folder: Path, needed: int, what: str) -> None:
    """Check that a disk has room for `needed` bytes.

    Raises:
        ValueError: beginning with `what`, with the needed and the free space.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise ValueError(f"{what} needs about {format_bytes(needed)}, but its disk has only {format_bytes(free)} free.")


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def disk_of(folder: Path) -> int:
    """Return the number of the disk that a folder is or will be on."""
    return _existing(folder).stat().st_dev


def default_state_dir(output_dir: Path) -> Path:
    """Return the folder, beside the output, for the state of a search without `--state_dir`."""
    return output_dir.absolute().with_name(f"{output_dir.absolute().name}.search")


def remove_state(state_dir: Path) -> None:
    """Remove the state of a finished search, and its folder if there is nothing else in it."""
    from ..search.state import FILE

    for name in (FILE, PLAN_FILE):
        (state_dir / name).unlink(missing_ok=True)
    if state_dir.is_dir() and not any(state_dir.iterdir()):
        state_dir.rmdir()
