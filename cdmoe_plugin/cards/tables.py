"""Tables in Markdown, and the wording of cards and tables for each form of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..plan import CondensePlan
from ..sizes import format_bytes


class FormText(NamedTuple):
    """The wording for one form of a plan.

    Args:
        done (`str`): Participle for the plan's layers.
        exported (`str`): Description of a checkpoint of the base architecture.
        change (`str`): Clause that describes the change, formatted with the number of `layers`.
    """

    done: str
    exported: str
    change: str


FORM_TEXTS = {
    "condense": FormText(
        "condensed",
        "condensed, with plain dense layers",
        "in {layers} decoder layers, the router and all but a few routed experts are removed. The kept experts,\n"
        "with constant gates, and the shared expert form one dense MLP\n"
        "([CD-MoE](https://arxiv.org/abs/2412.00069)).",
    ),
    "trim_layer": FormText(
        "trimmed",
        "trimmed, with plain dense layers",
        "in {layers} decoder layers, the whole MLP sub-layer is removed and only the residual\n"
        "passes (Layer Trimming, [He et al. 2024](https://arxiv.org/abs/2406.15786)).",
    ),
    "trim_block": FormText(
        "dropped",
        "with fewer decoder layers",
        "{layers} decoder layers are removed\n(Block Trimming, [He et al. 2024](https://arxiv.org/abs/2406.15786)).",
    ),
}


_METRICS = {
    "js": "Jensen-Shannon divergence",
    "kl": "Kullback-Leibler divergence",
    "mse": "mean squared difference",
    "ppl": "absolute difference of perplexity",
}
_OUTPUTS = {"hidden": "last hidden state", "logits": "logits"}


def divergence_name(plan: CondensePlan, own: bool = False) -> str:
    """Name the divergence that a plan's `score` and `layer_divergences` are, or (`own`) its `expert_scores`."""
    metric, compare = ((plan.config or {}).get(name) for name in ("metric", "compare"))
    if metric == "ppl":
        if not own:
            return _METRICS["ppl"]
        metric = "js"  # perplexity is defined on the model's output only
    output = "layer's output" if own else f"model's {_OUTPUTS.get(str(compare), 'output')}"
    unit = ", in nats" if metric in ("js", "kl") else ""
    return f"{_METRICS.get(str(metric), 'divergence' if metric is None else metric)} of the {output}{unit}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table with aligned columns, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    left = [all(isinstance(row[i], str) for row in rows) and i == 0 for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if is_left else ("-" * (w - 1) + ":") for w, is_left in zip(widths, left, strict=True)]
    return "\n".join([line(list(header)), line(rule), *(line(row) for row in texts)])


def plan_table(plan: CondensePlan) -> str:
    """Format the layers of a plan in the order of their selection, as a Markdown table."""
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
        return format_table([f"decoder layer {FORM_TEXTS[plan.form].done}", "similarity", "score"], trimmed)
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


def sizes_table(parameters: Mapping[str, int], dtype: Any) -> str:
    """Format the parameters and bytes of several models, and the savings relative to the first."""
    before = next(iter(parameters.values()))
    rows = [
        (name, f"{count:,}", format_bytes(count * dtype.itemsize), f"{1 - count / before:.1%}")
        for name, count in parameters.items()
    ]
    return format_table(["", "parameters", f"in {str(dtype).removeprefix('torch.')}", "saved"], rows)


def refit_table(errors: Mapping[str, Sequence[float]]) -> str:
    """Format the relative errors of condensed layers before and after their refit."""
    by_layer = sorted((int(layer), before, after) for layer, (before, after) in errors.items())
    rows = [(layer, f"{before:.3e}", f"{after:.3e}") for layer, before, after in by_layer]
    return format_table(["decoder layer", "error before", "after"], rows)


def recovery_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """Format the stages of training after condensing, from the summaries in a model's config."""
    rows = [
        (
            stage["stage"],
            f"{stage['held_out_before']:.4f}",
            f"{stage['held_out_after']:.4f}",
            f"{stage['tokens']:,}",
            f"{stage['trained']:,}",
        )
        for stage in stages
    ]
    return format_table(["stage", "held-out loss before", "after", "tokens", "parameters trained"], rows)
