"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..plan import CondensePlan

# What is said of a plan's layers, by its form.
DONE = {"condense": "condensed", "trim_layer": "trimmed", "trim_block": "dropped"}


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns line up, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    left = [all(isinstance(row[i], str) for row in rows) and i == 0 for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if is_left else ("-" * (w - 1) + ":") for w, is_left in zip(widths, left, strict=True)]
    return "\n".join([line(list(header)), line(rule), *(line(row) for row in texts)])


def plan_table(plan: CondensePlan) -> str:
    """The layers of a plan in the order of their selection, as a Markdown table."""
    if plan.form != "condense":
        similarities = plan.layer_similarities or {}
        trimmed = [
            (
                layer.layer,
                f"{similarities[layer.layer]:.4f}" if layer.layer in similarities else "",
                "" if layer.score is None else f"{layer.score:.3e}",
            )
            for layer in plan.layers
        ]
        return format_table([f"decoder layer {DONE[plan.form]}", "similarity", "score"], trimmed)
    rows = [
        (
            layer.layer,
            len(layer.experts),
            ", ".join(map(str, layer.experts)) or "none",
            "" if layer.expert_scores is None else f"{layer.expert_scores[-1]:.3e}",
            "" if layer.score is None else f"{layer.score:.3e}",
        )
        for layer in plan.layers
    ]
    return format_table(["decoder layer", "kept", "experts", "layer's own", "score"], rows)
