"""The figure of divergence per layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..plan import CondensePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_layer_divergences(plan: CondensePlan, path: str | os.PathLike) -> None:
    """Plot the divergence of the model's output with only one layer condensed (Figure 1 of the paper), as PNG.

    Raises:
        ValueError: if the plan has none, because its layers were given or ranked locally, or because it was truncated.
    """
    if not plan.layer_divergences:
        raise ValueError(
            "The plan has no divergence per layer: no layer search was run, its layers were ranked locally, or experts "
            "were dropped later."
        )
    figure = _bar_chart(plan.layer_divergences, [layer.layer for layer in plan.layers])
    figure.savefig(path, dpi=150)


def _bar_chart(divergences: dict[int, float], chosen: Sequence[int]) -> Figure:
    # matplotlib's object interface needs no global state and no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    layers = sorted(divergences)
    colours = ["tab:orange" if layer in chosen else "tab:blue" for layer in layers]
    axes.bar(range(len(layers)), [divergences[layer] for layer in layers], color=colours)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("decoder layer condensed alone (orange: chosen by the plan)")
    axes.set_ylabel("divergence of the output")
    # The first layers often have a hundred times the divergence of those in the middle.
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
