"""What people look at: tables, and the figure of divergence per layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .budget import experts_per_layer
from .condensed import apply_layers
from .config import CondenseConfig
from .loading import sketch_model
from .plan import CondensedLayer, CondensePlan
from .sparse import check_config, model_shape
from .trimming import check_trimming, parameters_without

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def dry_run(
    model_name_or_path: str | os.PathLike, request: CondensePlan | CondenseConfig, dtype: str = "auto", **hub: Any
) -> str:
    """What condensing would save, from a checkpoint's config alone: a Markdown table.

    Args:
        model_name_or_path (`str` or `os.PathLike`): Hub name or folder of a sparse checkpoint; no weight is read.
        request (`CondensePlan` or `CondenseConfig`): What would be condensed. Where a config leaves the layers to a
            search, the first sparse ones are counted; they all have the same size in nearly every architecture. An
            expert budget counts as spent in full; a search may leave some of it.
        dtype (`str`, defaults to `"auto"`): Dtype to count bytes in; "auto" is the checkpoint's own.
        **hub: `revision`, `trust_remote_code` and the like.

    Raises:
        UnsupportedModelError: if the model is dense or has sparse layers that can't be condensed.
        ValueError: if the request does not fit the model.
    """
    sketch, blocks = sketch_model(model_name_or_path, hub)
    width = (sketch.dtype if dtype == "auto" else getattr(torch, dtype)).itemsize
    if dtype != "auto":
        sketch.to(getattr(torch, dtype))  # a budget may be in bytes
    if isinstance(request, CondensePlan):
        request.check_fits(model_shape(sketch, blocks))
        experts = {layer.layer: len(layer.experts) for layer in request.layers}
        check_trimming(sketch, blocks, request.form, list(experts))
    else:
        check_config(request, blocks)
        check_trimming(sketch, blocks, request.form, request.layers, request.num_layers)
        layers = request.layers or [block.layer for block in blocks[: request.num_layers]]
        experts = experts_per_layer(request, layers, blocks)
    before = sketch.num_parameters()
    if request.form == "trim_block":
        after = parameters_without(sketch, blocks, list(experts))
    else:
        kept = [CondensedLayer(layer, list(range(number)), [1.0] * number) for layer, number in experts.items()]
        apply_layers(sketch, blocks, kept, request.form)
        after = sketch.num_parameters()
    rows = [
        (name, f"{count:,}", f"{count / 1e9:.2f} B", f"{count * width / 2**30:.2f} GiB", f"{1 - count / before:.1%}")
        for name, count in (("sparse", before), (f"{len(experts)} layers {DONE[request.form]}", after))
    ]
    return format_table(["model", "parameters", "", "weights", "saved"], rows)


def plot_layer_divergences(plan: CondensePlan, path: str | os.PathLike) -> None:
    """Draws the divergence of the model's output when one layer alone is condensed (Figure 1 of the paper), as PNG.

    Raises:
        ValueError: if the plan has none, because its layers were given or ranked locally, or because it was truncated.
    """
    if not plan.layer_divergences:
        raise ValueError(
            "The plan has no divergence per layer: no layer search was run (or a local one), or experts were dropped "
            "since."
        )
    figure = _bar_chart(plan.layer_divergences, [layer.layer for layer in plan.layers])
    figure.savefig(path, dpi=150)


def _bar_chart(divergences: dict[int, float], chosen: Sequence[int]) -> Figure:
    # The object interface: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    layers = sorted(divergences)
    colours = ["tab:orange" if layer in chosen else "tab:blue" for layer in layers]
    axes.bar(range(len(layers)), [divergences[layer] for layer in layers], color=colours)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("decoder layer condensed alone (orange: chosen by the plan)")
    axes.set_ylabel("divergence of the output")
    # The first layers often matter a hundred times as much as those in the middle.
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
