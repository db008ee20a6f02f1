"""What stands for Python in folders of `programs.py`: it lets the server of fork_server.py run a program.

It runs with `python -IS`, so it imports only what starts quickly. What the server can't run as it should be, because
of an option of Python or of the environment, gets a Python of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping

# Variables with these names are read when Python starts or when a library is imported.
_READ_ONCE = ("HF_", "PYTHON", "TRANSFORMERS_", "CDMOE_NO_LM_EVAL_HOOK")


def read_once(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that have to be those of the server."""
    return {name: value for name, value in environment.items() if name.startswith(_READ_ONCE)}


def main(folder: str, python: str, *arguments: str) -> int:
    """Run Python with these arguments in a fork of the server whose socket is in a folder; return the exit status."""
    given = [argument for argument in arguments if argument != "-u"]
    with open(os.path.join(folder, "environment.json")) as file:
        fits = json.load(file) == read_once(os.environ)
    if not fits or not given or (given[0].startswith("-") and given[0] not in ("-m", "-c")):
        os.execv(python, [python, *arguments])
    request = json.dumps({"arguments": given, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(folder, "socket"))
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        answer = connection.makefile().read()
    status = int(answer or 1)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
