"""A process that has imported the libraries, and runs programs of Python in forks of itself.

A program such as `cdmoe` imports for longer than it works on a tiny model. Its fork here gets the arguments, the
environment, the working directory, and the input and output of the program that asks (fork_client.py), and then runs
what Python would run. The server itself computes nothing, and has one thread: torch can be used in its forks.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("torch", "torch.distributed.run", "transformers.modeling_utils", "transformers.generation.utils", "datasets"),
    *("peft", "trl.trainer.sft_trainer", "matplotlib.pyplot", "accelerate.commands.launch"),
    *("lm_eval.__main__", "lm_eval._cli.harness", "lm_eval.evaluator", "lm_eval.models.huggingface"),
    *(f"cdmoe_plugin.scripts.{name}" for name in ("condense", "evaluate", "estimate", "export", "plan", "recover")),
    *("cdmoe_plugin.scripts.recover_stages", "cdmoe_plugin.integrations.lm_eval_model"),
)


def main(folder: str) -> None:
    """Import, say so, and run what is asked for until the standard input ends."""
    for name in LIBRARIES:
        with suppress(ImportError):  # other releases have it elsewhere
            importlib.import_module(name)
    setattr(os, "fsync", lambda _: None)  # noqa: B010 (as in conftest.py; mypy refuses an assignment)
    gc.collect()
    gc.freeze()  # or every fork would copy what it collects
    request = serve(Path(folder) / "socket")
    if request is not None:  # in a fork
        run(request, Path(folder) / "python")


def serve(path: Path) -> dict[str, Any] | None:
    """Answer requests until the standard input ends; in the fork that should run a program, return its request."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
        print("ready", flush=True)
        while sys.stdin in (ready := select.select([server, sys.stdin], [], [])[0]) or server in ready:
            if sys.stdin in ready:
                return None
            connection, _ = server.accept()
            with connection:
                request, streams = read(connection)
                if any(argument.endswith(("lm_eval", "evaluate")) for argument in request["arguments"]):
                    know_tasks()
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    server.close()
                    start(connection, streams)
                    return request
                for stream in streams:
                    os.close(stream)
    return None


def read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a request, and the standard streams that come with it."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(size, "big"))), streams


@cache
def know_tasks() -> None:
    """Read the files of lm-eval's tasks, as it does whenever it starts; there are 14,000."""
    if importlib.util.find_spec("lm_eval.tasks._index"):  # other releases have it elsewhere
        index = importlib.import_module("lm_eval.tasks._index")
        index.load_yaml = cache(index.load_yaml)
        importlib.import_module("lm_eval.tasks").TaskManager()
        gc.freeze()


def start(connection: socket.socket, streams: list[int]) -> None:
    """Return in a new process with these streams; tell the client how that ended, or end it with the client."""
    alive, held = os.pipe()  # the program holds one end for as long as it lives
    program = os.fork()
    if program == 0:
        os.setsid()
        connection.close()
        os.close(alive)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return
    for stream in (held, *streams, 0, 1, 2):
        os.close(stream)
    if alive not in select.select([alive, connection], [], [])[0]:
        os.killpg(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    try:
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    finally:
        os._exit(0)


def run(request: dict[str, Any], python: Path) -> None:
    """Run what Python runs with these arguments, as `__main__`."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    what, *rest = request["arguments"]
    sys.executable = str(python)  # for processes that the program starts
    if what == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif what == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [what, *rest], str(Path(what).resolve().parent)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
