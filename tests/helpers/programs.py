"""Programs that start at once: `python` and the commands of this environment, run by a server that has imported all.

What runs is the program itself with its own arguments, in a process of its own (fork_server.py). Tests of what happens
at the start of Python, of signals, or of a Python without the package start a real one.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import fork_client, fork_server

ROOT = Path(__file__).parents[2]
# What stands before the arguments of each program. `cdmoe` is found in a checkout that is not installed, too.
PROGRAMS = {
    "python": [],
    "python3": [],
    "cdmoe": ["-m", "cdmoe_plugin"],
    **{name: [str(Path(sys.executable).parent / name)] for name in ("accelerate", "lm_eval")},
}


@dataclass(frozen=True)
class Programs:
    """Where the programs are, and the environment that they were made for."""

    folder: Path
    environment: dict[str, str]

    @property
    def python(self) -> str:
        """What to start instead of `sys.executable`."""
        return str(self.folder / "python")


@contextmanager
def serving(home: Path) -> Iterator[Programs]:
    """Start a server, with the caches of Hugging Face's libraries in `home`; end it afterwards."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(home),  # also keeps the settings of accelerate on this machine out
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="cdmoe") as name:  # short: a socket's path has at most 107 bytes
        folder = Path(name)
        (folder / "environment.json").write_text(json.dumps(fork_client.read_once(environment)))
        for program, words in PROGRAMS.items():
            command = shlex.join([sys.executable, "-IS", fork_client.__file__, name, sys.executable, *words])
            (folder / program).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (folder / program).chmod(0o755)
        environment["PATH"] = os.pathsep.join([name, str(Path(sys.executable).parent), os.environ["PATH"]])
        command = [sys.executable, fork_server.__file__, name]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield Programs(folder, environment)
