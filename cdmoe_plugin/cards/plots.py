"""The figure of divergence per layer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..plan import CondensePlan
from .tables import FORM_TEXTS, divergence_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_layer_divergences(plan: CondensePlan, path: str | os.PathLike) -> None:
    """Plot the divergence of the model's output with only one layer condensed (Figure 1 of the paper), as PNG.

    The plan's own layers carry their numbers in the order of selection.

    Raises:
        ValueError: if the plan has none, because its layers were given or ranked locally, or because it was truncated.
    """
    if not plan.layer_divergences:
        raise ValueError(
            "The plan has no divergence per layer: no layer search was run, its layers were ranked locally, or experts "
            "were dropped later."
        )
    draw_figure(plan, plan.layer_divergences).savefig(path, dpi=150)


def draw_figure(plan: CondensePlan, divergences: dict[int, float]) -> Figure:
    """Draw a plan's divergences by decoder layer as points, those of its own layers with their numbers."""
    # The object interface: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    done, metric = FORM_TEXTS[plan.form].done, divergence_name(plan)
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    chosen = {layer.layer: i for i, layer in enumerate(plan.layers, 1) if layer.layer in divergences}
    others = [layer for layer in sorted(divergences) if layer not in chosen]
    # Points, as the length of a bar means nothing on a logarithmic scale, which has no zero.
    axes.plot(others, [divergences[layer] for layer in others], "o", color="0.65", markersize=6, label="not selected")
    axes.plot(
        list(chosen),
        [divergences[layer] for layer in chosen],
        "o",
        color="tab:blue",
        markersize=13,
        label=f"{done}, numbered in the order of selection",
    )
    for layer, order in chosen.items():
        place = (layer, divergences[layer])
        axes.annotate(str(order), place, ha="center", va="center_baseline", color="white", fontsize=8, weight="bold")
    axes.set_title(f"Decoder layers {done} one at a time", loc="left")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(metric.replace(" of the ", "\nof the "))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    # The first layers often matter a hundred times as much as those in the middle.
    axes.set_yscale("log" if min(divergences.values()) > 0 else "linear")
    axes.margins(y=0.12)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
