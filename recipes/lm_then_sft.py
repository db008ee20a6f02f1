# /// script
# dependencies = ["cdmoe_plugin[recipes]"]
# ///
"""Recover a condensed model: what `cdmoe recover` starts, for `accelerate launch` and for checkouts."""

import sys

from cdmoe_plugin.scripts.main import run_command


def train() -> None:
    from cdmoe_plugin.scripts import recover_stages

    recover_stages.train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_command("recover", train))
