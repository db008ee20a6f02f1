"""`cdmoe estimate`: sizes before and after condensing, from a checkpoint's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import CondenseConfig, condense_arguments, unused_with_plan
from ..plan import CondensePlan
from ..presets import PRESETS
from .arguments import BUDGET, GROUPS, CondenseArguments, EstimateArguments
from .parsing import Parser, given_fields

EXAMPLE = """
estimate --model_name_or_path deepseek-ai/deepseek-moe-16b-base --num_layers 9 --num_experts 6
"""


def make_parser() -> Parser:
    """Return the parser of `cdmoe estimate`."""
    return Parser(
        (EstimateArguments, condense_arguments(names=BUDGET)),
        GROUPS,
        ignored={*CondenseArguments.__dataclass_fields__, *CondenseConfig.__dataclass_fields__},
        command="estimate",
        description="Print a model's size before and after condensing. Only its config is read.",
        example=EXAMPLE,
    )


def main(arguments: Sequence[str]) -> None:
    """Run `cdmoe estimate` with the arguments of its command line."""
    args, budget = make_parser().parse_args_and_config(arguments)
    plan, config = requested(args, given_fields(budget))
    print_estimate(args, plan or config)


def requested(
    args: EstimateArguments, given: dict[str, Any], calibration: str | None = None, reads: bool = False
) -> tuple[CondensePlan | None, CondenseConfig]:
    """Return the plan, if one is given, cut to the budget, and the config.

    Args:
        args (`EstimateArguments`): The options.
        given (`dict[str, Any]`): The fields of `CondenseConfig` that were set. A plan brings its own budget; a search
            takes the defaults, or those of `--preset`, for the others.
        calibration (`str`, *optional*): Calibration data, which a plan needs for a refit only.
        reads (`bool`, defaults to `False`): Whether something else needs calibration data.

    Raises:
        ValueError: if an option would do nothing beside a plan, or the plan is smaller than the budget.
    """
    if args.preset is not None and args.preset not in PRESETS:
        raise ValueError(f"`--preset` is {args.preset!r}, but only {', '.join(map(repr, PRESETS))} exist.")
    plan = CondensePlan.load(args.plan) if args.plan else None
    config = CondenseConfig(**(PRESETS[args.preset] if args.preset else {}) | given)
    config.check_given(given)
    if plan is not None:
        form = given.get("form", plan.form)
        unused = unused_with_plan(given | ({"refit": config.refit} if config.refit else {}), reads)
        unused += ["preset"] if args.preset and not config.refit else []
        if unused or (calibration and not config.refit and not reads):
            raise ValueError(f"With `--plan` there is no search: {unused or ['calibration']} would do nothing.")
        plan = plan.truncate(given.get("num_layers"), given.get("num_experts"), given.get("target_size"))
        plan = plan if form == plan.form else plan.as_trimming(form)
    return plan, config


def print_estimate(args: EstimateArguments, request: CondensePlan | CondenseConfig) -> None:
    """Print sizes before and after as a Markdown table."""
    from ..estimate import dry_run

    print(dry_run(args.model_name_or_path, request, dtype=args.dtype, text_only=args.text_only, **args.hub))
