"""`cdmoe plan`: show a plan, cut it to a smaller budget, or compare two."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import takewhile

from ..cards.page import write_page
from ..cards.tables import FORM_TEXTS, format_table, plan_table
from ..plan import CondensePlan
from ..sizes import read_share
from .parsing import PlainParser

HELP = """usage: cdmoe plan {show,truncate,compare} PLAN [options]

Look at plans. A PLAN is a condense_plan.json, or the folder of a condensed checkpoint.

  cdmoe plan show deepseek-moe-cd9 --html report.html

commands:
  show      layers in the order of their selection, with their experts; sizes; the search that found them
  truncate  cut a plan to fewer layers or experts, or to a smaller size, without another search
  compare   layers and experts that two plans have in common
"""
_PLAN = "A condense_plan.json, or the folder of a condensed checkpoint."


def main(arguments: Sequence[str]) -> None:
    """Run `cdmoe plan` with the arguments of its command line."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {"show": show, "truncate": truncate, "compare": compare}
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(HELP, end="")
    elif name in commands:
        commands[name](rest)
    else:
        raise ValueError(f"`cdmoe plan {name}` does not exist; there are {', '.join(commands)}.")


def show(arguments: Sequence[str]) -> None:
    """Print a plan: its layers, sizes and origin."""
    parser = PlainParser("plan show", "Print a plan.", "plan show deepseek-moe-cd9 --html report.html")
    parser.add_argument("plan", help=_PLAN)
    parser.add_argument("--html", metavar="FILE", help="Also write the plan as one HTML page, with charts.")
    args = parser.parse_args(arguments)
    plan = CondensePlan.load(args.plan)
    print("\n\n".join(filter(None, (plan_table(plan), sizes(plan), origin(plan)))))
    if args.html is not None:
        write_page(plan, args.html)
        print(f"\nSaved to {args.html}.")


def sizes(plan: CondensePlan) -> str:
    """Describe what the plan keeps of its layers, if it knows its model."""
    if plan.model is None:
        return ""
    shapes = {shape.layer: shape for shape in plan.model.sparse_layers}
    rows = []
    for layer in plan.layers:
        shape = shapes[layer.layer]
        shared = shape.shared_intermediate_size if not plan.form.startswith("trim") else 0
        before = shape.num_experts * shape.intermediate_size + shape.shared_intermediate_size
        after = layer.dense_neurons(shape.intermediate_size) + shared
        after += len(layer.routed or ()) * shape.intermediate_size
        rows.append((layer.layer, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}"))
    done = "changed" if plan.spread is not None else FORM_TEXTS[plan.form].done
    count = f"{len(plan.layers)} of {len(shapes)} sparse layers {done}; neurons of their MLPs:"
    return f"{count}\n\n{format_table(['decoder layer', 'before', 'after', 'saved'], rows)}"


def origin(plan: CondensePlan) -> str:
    """Describe the model that the plan was made for, the search and its data, as far as the plan says."""
    lines = []
    if plan.model is not None:
        lines.append(f"Model: {plan.model.model_type}, {plan.model.num_hidden_layers} decoder layers.")
    if plan.config:
        values = [f"{name}={value}" for name, value in plan.config.items() if value is not None]
        lines.append(f"Search: {', '.join(values)}.")
    if plan.token_layers is not None:
        lines.append(f"Work of the layer search: {plan.token_layers:,} token-layers.")
    if plan.restricted:
        cost = plan.restricted
        lines.append(
            f"Restricted to what can be exported: divergence {cost['divergence']:.3e}, against "
            f"{cost['free_divergence']:.3e} for the free choice of decoder layers {cost['free_layers']}."
        )
    if plan.calibration:
        lines.append(f"Calibration: {', '.join(f'{name}={value}' for name, value in plan.calibration.items())}.")
    return "\n".join(lines)


def truncate(arguments: Sequence[str]) -> None:
    """Write a plan that is cut to a smaller budget."""
    parser = PlainParser(
        "plan truncate",
        "Cut a plan to fewer layers or experts, or to a smaller size. No search is needed.",
        "plan truncate deepseek-moe-cd9 --num_layers 6 --output_file cd6.json",
    )
    parser.add_argument("plan", help=_PLAN)
    parser.add_argument("--num_layers", type=int, help="The plan's first layers to keep.")
    parser.add_argument("--num_experts", type=int, help="Experts to keep in each layer, at most.")
    parser.add_argument("--target_size", help="Size of the model, for a plan that was searched for a size: 0.5, 24GB.")
    parser.add_argument("--output_file", required=True, help="JSON file to write.")
    args = parser.parse_args(arguments)
    if args.num_layers is None and args.num_experts is None and args.target_size is None:
        raise ValueError("`--num_layers`, `--num_experts` or `--target_size` is needed: the budget to cut the plan to.")
    target = None if args.target_size is None else read_share(args.target_size)
    plan = CondensePlan.load(args.plan).truncate(args.num_layers, args.num_experts, target)
    plan.save(args.output_file)
    print(f"{plan_table(plan)}\nSaved to {args.output_file}.")


def compare(arguments: Sequence[str]) -> None:
    """Print what two plans have in common."""
    parser = PlainParser("plan compare", "Compare two plans.", "plan compare deepseek-moe-cd9 other_plan.json")
    for name in ("first", "second"):
        parser.add_argument(name, help=_PLAN)
    args: argparse.Namespace = parser.parse_args(arguments)
    print(comparison(CondensePlan.load(args.first), CondensePlan.load(args.second)))


def comparison(first: CondensePlan, second: CondensePlan) -> str:
    """Describe the layers and experts that two plans share, how far their orders agree, and how the gates differ."""
    ours, theirs = ({layer.layer: layer for layer in plan.layers} for plan in (first, second))
    common = [layer for layer in ours if layer in theirs]
    fewer = min(len(ours), len(theirs))
    same_start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    lines = [
        f"Layers: {len(ours)} and {len(theirs)}, {len(common)} in common; the first {same_start} are the same, in the "
        f"same order. Among the first {fewer} of both, {len(set(list(ours)[:fewer]) & set(list(theirs)[:fewer]))} are "
        "the same in any order."
    ]
    if not common:
        return lines[0]
    rows = []
    for index in common:
        a, b = ours[index], theirs[index]
        gates, others = (dict(zip(layer.experts, layer.gates, strict=True)) for layer in (a, b))
        shared = gates.keys() & others.keys()
        difference = max((abs(gates[expert] - others[expert]) for expert in shared), default=None)
        cells = (len(a.experts), len(b.experts), len(shared), "" if difference is None else f"{difference:.3e}")
        rows.append((index, *cells))
    header = ["decoder layer", "experts", "experts", "in common", "gates' largest difference"]
    return "\n\n".join([*lines, format_table(header, rows)])
