"""`cdmoe recover`: start the training of recover_stages.py through accelerate, on all GPUs."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import CalledProcessError

# Options that TRL's arguments have too, and that the training gets.
SHARED = ("--debug", "--gradient_accumulation_steps", "--gradient-accumulation-steps")


def main(arguments: Sequence[str]) -> int | None:
    """Run `cdmoe recover` with the arguments of its command line; return the exit code of the training.

    A process that accelerate or torchrun has started trains itself.
    """
    if {"-h", "--help"} & set(arguments) or {"ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"} & os.environ.keys():
        from .recover_stages import train

        train(arguments)
        return None
    return launch(arguments)


def launch(arguments: Sequence[str]) -> int:
    """Run `cdmoe recover` again in processes that accelerate starts, and return the exit code."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Each process says itself what went wrong; and that there are defaults, the description of the run shows.
    for name in ("torch.distributed.elastic", "accelerate.commands.launch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with waiting_for_children():
            launch_command(split_arguments(arguments))
    except CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def split_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options of `accelerate launch`; all others become arguments of the processes."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    # The script is ours, so the parser should not take any word for it.
    parser._actions = [action for action in parser._actions if action.option_strings]
    for option in SHARED:
        del parser._option_string_actions[option]
    args, rest = parser.parse_known_args(arguments)
    args.module, args.training_script, args.training_script_args = True, "cdmoe_plugin", ["recover", *rest]
    return args


@contextmanager
def waiting_for_children() -> Iterator[None]:
    """Leave Ctrl-C to the processes that were started, which say what was kept."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which they would inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
