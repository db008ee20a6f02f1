"""Programs in a Python of their own, with the package or without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# The first line of a program for which the package is not installed.
WITHOUT_PACKAGE = 'import sys; sys.modules["cdmoe_plugin"] = None\n'


def answer_of(program: str, folder: Path, place: Path) -> Any:
    """The JSON that a program prints last; it gets `folder` as argument, its caches in `place`, and no input."""
    caches = {"HF_HOME": str(place), "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **caches, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=env, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
