"""The command `cdmoe`: it finds a command's module, and ends with one line where the user can put things right."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "condense": "search a plan, or apply one, and save the condensed model",
    "recover": "train the condensed layers: language modelling, then fine-tuning",
    "evaluate": "run lm-eval's tasks on a condensed model, or on a base model with a plan",
    "export": "write a condensed model as a checkpoint that opens without this package",
    "estimate": "sizes before and after condensing, from the config alone",
    "plan": "show a plan, cut it to a smaller budget, or compare two",
}
HELP = f"""usage: cdmoe COMMAND [options]

Condense sparse Mixture-of-Experts models into small dense ones (CD-MoE, arXiv 2412.00069).

  cdmoe estimate --model_name_or_path deepseek-ai/deepseek-moe-16b-base
  cdmoe condense --config deepseek-moe-16b --output_dir deepseek-moe-cd9

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

`cdmoe COMMAND --help` explains the options. CDMOE_DEBUG=1 in the environment shows the traceback of every error.
"""
# The extra of this package that brings a library.
EXTRAS = {"trl": "recipes", "peft": "recipes", "datasets": "calibration", "matplotlib": "plot"}
EXTRAS |= {"bitsandbytes": "quantize", "lm_eval": "lm-eval"}
# Where a `ValueError` is about what the user asked for: our own checks, and transformers' when it opens a checkpoint or
# finds no place for its weights.
CHECKING = (
    "cdmoe_plugin.",
    "transformers.models.auto.",
    "transformers.dynamic_module_utils",
    "transformers.integrations.accelerate",
)
USER_ERROR, INTERRUPTED = 2, 128 + signal.SIGINT
_GRACE = 10.0


def main(args: Sequence[str] | None = None) -> int:
    """Run `cdmoe` with these arguments, or with those of the program, and return the exit code."""
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if name not in COMMANDS:
        print(f"cdmoe: error: unknown command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    return run_command(name, lambda: import_module(f".{name}", __package__).main(rest))


def run_command(name: str, command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code: 2 after an error that the user can mend, 130 after Ctrl-C.

    All other exceptions are bugs, and keep their traceback.

    Args:
        name (`str`): Its name, for messages.
        command (`Callable`): The command; what it returns, if anything, is the exit code.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        return command() or 0
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher may send it once more
        if rank == 0:
            print(f"cdmoe {name}: interrupted. {stop}".rstrip(), file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:
        if rank > 0:  # most likely what the main process says, or its loss; its launcher then ends this one, too
            time.sleep(_GRACE)
        message = _message(error)
        if message is None or os.environ.get("CDMOE_DEBUG", "") not in ("", "0"):
            raise
        print(f"cdmoe {name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        return USER_ERROR


def _message(error: Exception) -> str | None:
    """Return what to tell the user; None if the error is a bug."""
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(library)
        return extra and f"this needs {library}, which is not installed: pip install 'cdmoe_plugin[{extra}]'"
    if isinstance(error, OSError):  # a missing file or checkpoint, the hub, a full disk
        return f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
    if isinstance(error, ValueError):
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        return str(error) if innermost.f_globals.get("__name__", "").startswith(CHECKING) else None
    return None
