"""Atomic replacement of folders and files: a reader finds either the old content or the new one."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Name of the temporary folder of `replacing_files`; the group is the name of the folder that it will replace.
STAGING = re.compile(r"\.(.+)\.saving-\d+")
NO_NAME = re.compile(r"(?!)")  # matches nothing


@contextmanager
def replacing_files(
    target: str | os.PathLike, stale: re.Pattern[str] = NO_NAME, keep: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` in one step when the block ends without an error.

    Until then `target` is unchanged. Its other files are kept, as hard links in the new folder, except those whose
    names match `stale`, such as shards of an earlier save. Files of `target` for which `keep` returns true are not
    replaced. A killed process leaves the old content or the new one, and at most a folder ".<name>.saving-<digits>"
    beside or inside it, which the next save removes.

    Some folders can't be replaced: mount points, the working directory and its parents, folders whose parent is not
    writable and, outside Linux and on a few file systems, any folder that is not empty. There, files are moved one by
    one, the old config.json out first and the new one in last, so that no half-written checkpoint can be opened.

    Raises:
        ValueError: if `target` is a file, or has a folder with the name of a file that was written.
    """
    if not os.fspath(target):
        raise ValueError("`save_directory` is empty: name a folder.")
    target = Path(target).resolve()
    if target.is_file():
        raise ValueError(f"`save_directory` should be a folder, but {target} is a file.")
    if STAGING.fullmatch(target.name):  # part of an outer save
        yield target
        return
    staging, lock = _new_staging(target)
    try:
        yield staging
        new = [path.relative_to(staging) for path in staging.rglob("*") if not path.is_dir()]
        written = [name for name in new if not keep(target / name)]
        for name in set(new) - set(written):
            (staging / name).unlink()
        for name in written:
            if (target / name).is_dir():
                raise ValueError(f"`save_directory` holds a folder {name}, but a file with this name should be saved.")
            to_disk(staging / name)
        try:
            _swap(staging, target, stale)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            _move_files(staging, target, written, stale)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _new_staging(target: Path) -> tuple[Path, int | None]:
    """Make and lock an empty folder beside `target`, or in it if files can't be moved from there to `target`."""
    for leftover in (path for place in (target.parent, target) for path in place.glob(".*.saving-*")):
        match = STAGING.fullmatch(leftover.name)
        lock = _lock(leftover, wait=False) if match and match[1] == target.name else None
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
    while True:
        is_new = not target.exists()
        staging = (target.parent if is_new else target) / f".{target.name}.saving-{secrets.randbits(32)}"
        staging.mkdir(parents=True)
        if not is_new:
            with suppress(OSError):
                _copy_metadata(target, staging)
                staging = staging.rename(target.parent / staging.name)
        lock = _lock(staging, wait=True)
        if staging.exists():  # otherwise another process took it for a leftover before it was locked
            return staging, lock


def _lock(folder: Path, wait: bool) -> int | None:
    """Lock a folder until the returned handle is closed or the process ends; return None if locking fails."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)  # an error on Windows
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        if handle is not None:
            os.close(handle)
        return None


def _copy_metadata(folder: Path, copy: Path) -> None:
    """Copy the owner, mode and attributes of a folder to another."""
    if hasattr(os, "chown"):
        os.chown(copy, folder.stat().st_uid, folder.stat().st_gid)
    shutil.copystat(folder, copy)


def _swap(new: Path, target: Path, stale: re.Pattern[str]) -> None:
    """Exchange `new` and `target` in one step.

    Raises:
        OSError: if that is not possible. `target` is then unchanged.
    """
    if Path.cwd().is_relative_to(target):
        raise OSError("the working directory can't be replaced")
    to_disk(new)
    try:
        new.rename(target)  # works if `target` does not exist or is an empty folder
    except OSError:
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
        if renameat2 is None:
            raise
        _link_missing(target, new, stale)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange):
            raise OSError("folders can't be exchanged here") from None
    with suppress(OSError):
        to_disk(target.parent)
        _link_missing(new, target, stale)  # files that other processes have written since


def _link_missing(old: Path, new: Path, stale: re.Pattern[str] = NO_NAME) -> None:
    """Make hard links in `new` to the files of `old` that it lacks; `old` keeps them."""
    for path in old.iterdir():
        other = new / path.name
        if path.is_dir() and not path.is_symlink():
            if path.is_mount():
                raise OSError("a mount point can't be moved")
            if not other.exists():
                other.mkdir()
                _copy_metadata(path, other)
            _link_missing(path, other)
        elif not stale.fullmatch(path.name) and not os.path.lexists(other):
            os.link(path, other, follow_symlinks=False)
    to_disk(new)


def _move_files(new: Path, target: Path, written: list[Path], stale: re.Pattern[str]) -> None:
    """Move files one by one, the old ones out before the new ones in; undo all moves if one fails."""
    opening = (Path("config.json"), Path("adapter_config.json"))  # without these, transformers opens no checkpoint
    target.mkdir(parents=True, exist_ok=True)
    going = {Path(path.name) for path in target.iterdir() if stale.fullmatch(path.name) and not path.is_dir()}
    going |= {name for name in written if os.path.lexists(target / name)}
    moves = [(target / name, new / ".before" / name) for name in sorted(going, key=lambda name: name not in opening)]
    moves += [(new / name, target / name) for name in sorted(written, key=lambda name: name in opening)]
    try:
        for source, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            source.replace(place)
            to_disk(target)
    except BaseException:
        for source, place in reversed(moves):
            if os.path.lexists(place) and not os.path.lexists(source):
                place.replace(source)
        raise


def to_disk(path: Path) -> None:
    """Flush a file or folder to the disk, so that it survives a loss of power."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't flush a folder
            raise
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Write a JSON file. An existing file is replaced in one step, or kept if that fails, even at a loss of power.

    A killed process leaves a file ".<name>.writing-<machine>-<process>", which the next one on the same machine
    removes.

    Raises:
        OSError: if the file can't be written, for example because the disk is full. An existing file is unchanged.
        ValueError: if `values` contain NaN or infinity, which JSON lacks.
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
        raise OSError(error.errno, f"{error.strerror}: could not be written and is unchanged", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    to_disk(path.parent)


def read_json(path: str | os.PathLike) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: if it is not valid JSON, which has no NaN and no Infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it contains {constant}")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _remove_leftovers(folder: Path, prefix: str) -> None:
    if os.name != "posix":  # elsewhere, `os.kill` with signal 0 ends the process
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
    except PermissionError:  # it belongs to another user
        return True
    return True
