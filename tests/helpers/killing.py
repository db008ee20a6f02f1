"""Processes that are killed: forks of the tests' own, so that none has to import torch first."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

# What is done to folders, as `sys.audit` tells of it right before. `os.listdir` is the first thing after an exchange.
MOMENTS = frozenset({"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.listdir"})
KILLED = -signal.SIGKILL


def start(action: Callable[[], object]) -> int:
    """Runs something in a process of its own, whose id is returned."""
    # Ctrl-C has to wait until the new process is ready for it: it must never get out of this function.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def end(process: int) -> int:
    """Waits for a process: its exit status, or the signal that ended it times -1."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(action: Callable[[], object]) -> int:
    """Runs something in a process of its own to its end: its exit status, or the signal that ended it times -1."""
    return end(start(action))


def run_and_kill(action: Callable[[], object], after: float, how: int = signal.SIGKILL) -> int:
    """As `run`, but the process gets a signal after some seconds."""
    process = start(action)
    time.sleep(after)
    os.kill(process, how)  # also of one that has ended: nobody has waited for it yet
    return end(process)


def dying_before(moment: int, action: Callable[[], object], moments: frozenset[str] = MOMENTS) -> Callable[[], None]:
    """An action that kills its own process right before the n-th thing that it does to a disk, counted from 0."""
    left = moment

    def watch(event: str, _arguments: object) -> None:
        nonlocal left
        if event in moments:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    def run_watched() -> None:
        sys.addaudithook(watch)  # it can't be removed: for processes that end
        action()

    return run_watched
