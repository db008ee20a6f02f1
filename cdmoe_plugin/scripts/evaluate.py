"""`cdmoe evaluate`: lm-eval's command line with this package's model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXAMPLE = """\
Run lm-eval on a condensed model, or on a base model with a plan. The options are those of `lm-eval run`; without
--model, it is cdmoe. The subcommands `ls` and `validate` work as well.

  cdmoe evaluate --model_args pretrained=qwen-cd9 --tasks arc_challenge,piqa --batch_size auto
  cdmoe evaluate --model_args pretrained=Qwen/Qwen1.5-MoE-A2.7B,plan=qwen-cd9 --tasks arc_challenge
"""
SUBCOMMANDS = ("run", "ls", "validate")
# A YAML file may name the model, too, and would lose to the command line.
_NAMES_MODEL = ("--model", "-M", "--config", "-C")


def main(arguments: Sequence[str]) -> None:
    """Run `cdmoe evaluate` with the arguments of its command line."""
    import lm_eval.models  # noqa: F401  (lm-eval's own models must be in its registry first)
    from lm_eval.__main__ import cli_evaluate

    from cdmoe_plugin_lm_eval import register

    register()  # packages in a PYTHONPATH have no .pth file that is processed
    words = lm_eval_arguments(arguments)
    if words[0] == "run" and {"-h", "--help"} & set(words):
        print(EXAMPLE)
    sys.argv = ["cdmoe evaluate", *words]
    cli_evaluate()


def lm_eval_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments for lm-eval: its subcommand, and the model where none is named."""
    subcommand, *rest = arguments if arguments and arguments[0] in SUBCOMMANDS else ["run", *(arguments or ["--help"])]
    if subcommand == "run" and not any(word.partition("=")[0] in _NAMES_MODEL for word in rest):
        rest = ["--model", "cdmoe", *rest]
    return [subcommand, *rest]
