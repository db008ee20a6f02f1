"""Folders that are replaced in one step: what a checkpoint's folder holds is the old content or the new one.

A copy of this file lies beside saved weights, see `modeling_cdmoe`: it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MODEL_CARD_MARK = "<!-- written by cdmoe_plugin -->"
# Where a folder is written before it gets its place, see `replacing_files`; the group is the name that it will have.
STAGING = re.compile(r"\.(.+)\.saving-\d+")
NO_NAME = re.compile(r"(?!)")  # matches nothing
# Of the card that transformers makes for models that have none.
_GENERIC_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."


@contextmanager
def replacing_files(target: str | os.PathLike, stale: re.Pattern[str] = NO_NAME) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `target`, in one step, when the block ends without an error.

    Until then `target` stays as it was. Its other files are in the new folder too (by hard links), except those whose
    names match `stale`: shards of an older save must not stay. A process that is killed leaves the old content or the
    new one, and at worst a folder ".<name>.saving-<digits>" beside it or in it, which the next save removes.

    Some folders can't be replaced: mount points, the working directory and those above it, those whose parent folder
    the user may not write to; outside Linux, and on a few file systems, any that is not empty. There, files are moved
    one by one, the old config.json out first and the new one in last: what a killed process leaves does not open.

    Raises:
        ValueError: if `target` is a file, or holds a folder by the name of a file that was written.
    """
    if not os.fspath(target):
        raise ValueError("`save_directory` is empty: name a folder.")
    target = Path(target).resolve()
    if target.is_file():
        raise ValueError(f"`save_directory` should be a folder, but {target} is a file.")
    if STAGING.fullmatch(target.name):  # a part of something larger that is being saved
        yield target
        return
    staging, lock = _new_staging(target)
    try:
        yield staging
        if is_someones_card(target / "README.md"):
            (staging / "README.md").unlink(missing_ok=True)
        written = [path.relative_to(staging) for path in staging.rglob("*") if not path.is_dir()]
        for name in written:
            if (target / name).is_dir():
                raise ValueError(f"`save_directory` holds a folder {name}, but a file of this name is to be saved.")
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
    """An empty folder beside `target`, or in it where nothing can be moved between the two places; and its lock."""
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
                _imitate(target, staging)
                staging = staging.rename(target.parent / staging.name)
        lock = _lock(staging, wait=True)
        if staging.exists():  # else another process took it for a leftover before it was locked
            return staging, lock


def _lock(folder: Path, wait: bool) -> int | None:
    """A handle that marks a folder as in use until it is closed or its process ends; None where that can't be had."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)  # an error on Windows
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        if handle is not None:
            os.close(handle)
        return None


def _imitate(folder: Path, copy: Path) -> None:
    """Gives a folder the owner, the mode and the attributes of another."""
    if hasattr(os, "chown"):
        os.chown(copy, folder.stat().st_uid, folder.stat().st_gid)
    shutil.copystat(folder, copy)


def _swap(new: Path, target: Path, stale: re.Pattern[str]) -> None:
    """Puts `new` in the place of `target` in one step; what was there is then in the place of `new`.

    Raises:
        OSError: if that can't be done. `target` is then as it was.
    """
    if Path.cwd().is_relative_to(target):
        raise OSError("the working directory can't be replaced")
    to_disk(new)
    try:
        new.rename(target)  # where nothing is there, or an empty folder
    except OSError:
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
        if renameat2 is None:
            raise
        _take_over(target, new, stale)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange):
            raise OSError("folders can't be exchanged here") from None
    with suppress(OSError):
        to_disk(target.parent)
        _take_over(new, target, stale)  # what others have written since


def _take_over(old: Path, new: Path, stale: re.Pattern[str] = NO_NAME) -> None:
    """Links into `new` what it lacks of `old`, so that nothing is missing in the one, nor gone from the other."""
    for path in old.iterdir():
        other = new / path.name
        if path.is_dir() and not path.is_symlink():
            if path.is_mount():
                raise OSError("a mount point can't be moved")
            if not other.exists():
                other.mkdir()
                _imitate(path, other)
            _take_over(path, other)
        elif not stale.fullmatch(path.name) and not os.path.lexists(other):
            os.link(path, other, follow_symlinks=False)
    to_disk(new)


def _move_files(new: Path, target: Path, written: list[Path], stale: re.Pattern[str]) -> None:
    """Moves files one by one, those that are replaced out first; an error takes all of it back."""
    opening = (Path("config.json"), Path("adapter_config.json"))  # by these, transformers knows a checkpoint
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
    """Waits until a file or folder is where a loss of power does not reach it."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't wait for a folder
            raise
    finally:
        os.close(handle)


def is_someones_card(path: Path) -> bool:
    """Whether a file is a model card that somebody wrote, which a save must not replace by the generated one."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return MODEL_CARD_MARK not in text and _GENERIC_CARD not in text
