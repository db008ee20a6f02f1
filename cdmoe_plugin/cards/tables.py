"""Tables in Markdown, and the wording of cards and tables for each form of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..plan import CondensePlan
from ..sizes import format_bytes
from ..spread import Choice, Spread


class FormText(NamedTuple):
    """The wording for one form of a plan.

    Args:
        done (`str`): Participle for the plan's layers.
        exported (`str`): Description of a checkpoint of the base architecture.
        change (`str`): Clause that describes the change, formatted with the number of `layers`, the `rest` of the
            routed experts and the parts `kept`, which form the MLP.
    """

    done: str
    exported: str
    change: str


FORM_TEXTS = {
    "condense": FormText(
        "condensed",
        "condensed, with plain dense layers",
        "in {layers} decoder layers, the router and all but {rest} are removed.\n"
        "{kept} one dense MLP\n([CD-MoE](https://arxiv.org/abs/2412.00069)).",
    ),
    "prune_experts": FormText(
        "pruned",
        "with fewer experts",
        "in {layers} decoder layers, only some experts stay behind the router and the others are\nremoved.",
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

# Of layers in plans of the form "condense".
MIXED_TEXT = (
    "in {layers} decoder layers, some experts stay behind the router, and a dense MLP beside them\n"
    "stands in for the others."
)

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
    if plan.spread is not None:
        return spread_table(plan, plan.spread)
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
    rows: list[tuple[Any, ...]] = [
        (
            layer.layer,
            len(layer.experts),
            ", ".join(map(str, layer.experts)) or "none",
            "" if layer.expert_scores is None else f"{layer.expert_scores[-1]:.3e}",
            "" if layer.score is None else f"{layer.score:.3e}",
        )
        for layer in plan.layers
    ]
    header = ["decoder layer", "kept", "experts", "layer's own", "score"]
    if any(layer.width is not None for layer in plan.layers):
        header[1:1] = ["neurons"]
        rows = [
            (row[0], "" if k.width is None else k.width, *row[1:]) for row, k in zip(rows, plan.layers, strict=True)
        ]
    if any(layer.routed is not None for layer in plan.layers):
        header[1:1] = ["behind the router"]
        rows = [(row[0], len(k.routed or ()), *row[1:]) for row, k in zip(rows, plan.layers, strict=True)]
    return format_table(header, rows)


class LayerRow(NamedTuple):
    """The outcome of a search for a size in one sparse layer.

    Args:
        layer (`int`): Decoder layer index.
        form (`str`): "untouched", "mixed" (some experts stay behind the router) or "condensed".
        choice (`Choice`): Its experts that stay and its dense neurons.
        num_experts (`int`): Its routed experts in the sparse model.
        error (`float`): Error of its output, relative to the size of that.
        sensitivity (`float`): How much a relative error of 1 would change the model's output.
        effect (`float`): The estimated change of the model's output.
        if_condensed (`float`, *optional*): That of the widest condensed form.
    """

    layer: int
    form: str
    choice: Choice
    num_experts: int
    error: float
    sensitivity: float
    effect: float
    if_condensed: float | None


def spread_rows(plan: CondensePlan, spread: Spread) -> list[LayerRow]:
    """List what became of every sparse layer and why, by depth."""
    changed = {layer.layer: layer for layer in plan.layers}
    rows = []
    for layer in spread.layers:
        row, options = changed.get(layer.layer), layer.options()
        choice = layer.untouched if row is None else Choice(len(row.routed or ()), row.width or 0)
        form = "untouched" if row is None else "mixed" if row.routed else "condensed"
        effect, _ = options[choice]
        widest = max((each for each in options if not each.routed), key=lambda each: each.width, default=None)
        alone = None if widest is None else options[widest][0]
        why = (layer.error(choice), layer.sensitivity, effect, alone)
        rows.append(LayerRow(layer.layer, form, choice, layer.num_experts, *why))
    return rows


def spread_table(plan: CondensePlan, spread: Spread) -> str:
    """Format what became of every sparse layer and why, as a Markdown table.

    The error of a layer is relative to the size of its output. Times the layer's sensitivity, it is the estimated
    change of the model's output. The last column is that of the widest condensed form.
    """
    rows = [
        (
            row.layer,
            row.form,
            f"{row.choice.routed} of {row.num_experts}",
            row.choice.width,
            f"{row.error:.3f}",
            f"{row.sensitivity:.3e}",
            f"{row.effect:.3e}",
            "" if row.if_condensed is None else f"{row.if_condensed:.3e}",
        )
        for row in spread_rows(plan, spread)
    ]
    header = ["decoder layer", "form", "experts", "dense neurons", "error", "sensitivity", "effect", "if condensed"]
    return format_table(header, rows)


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


def cut_from(plan: CondensePlan) -> str:
    """Describe the budget of the search that a plan was cut from; empty for a whole plan."""
    if plan.cut_from is None:
        return ""
    if plan.cut_from.get("target_size") is not None:
        return f"a size of {plan.cut_from['target_size']}"
    layers = f"{plan.cut_from['num_layers']} layers"
    if plan.form != "condense":
        return layers
    budget = plan.cut_from["expert_budget"]
    if budget is not None:
        return f"{layers} and {budget} experts in all" if isinstance(budget, int) else f"{layers} and {budget}"
    return f"{layers} and {plan.cut_from['num_experts']} experts"
