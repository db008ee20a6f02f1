"""An expert budget, spread over the chosen layers as numbers of neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...blocks import SparseBlock
from ...knapsack import cheapest
from ...spread import LayerCurves
from ..budget import LayerBudget
from .forms import condensed_parameters, dense_widths
from .measure import Families, Family


def condensed_only(budget: LayerBudget) -> Families:
    """Return the forms of a layer without experts behind the router, as wide as the budget may make it."""

    def families(block: SparseBlock, _order: Sequence[int]) -> list[Family]:
        most = budget.depth(block.layer) * block.intermediate_size
        return [Family([], dense_widths(block, 0, most), condensed_parameters(block)[0])]

    return families


def spread_widths(
    curves: Sequence[LayerCurves], blocks: Mapping[int, SparseBlock], budget: LayerBudget
) -> dict[int, int]:
    """Choose the number of dense neurons of each layer so that the model's output changes least within the budget.

    Args:
        curves (`list[LayerCurves]`): The errors of the condensed layers by width.
        blocks (`dict[int, SparseBlock]`): The sparse blocks by decoder layer.
        budget (`LayerBudget`): The budget. A neuron costs its share of an expert.
    """
    scale = math.lcm(*(blocks[layer.layer].intermediate_size for layer in curves))
    effects, costs = {}, {}
    for layer in curves:
        [curve] = layer.curves
        neuron = budget.costs[layer.layer] * scale // blocks[layer.layer].intermediate_size
        effects[layer.layer] = [max(layer.sensitivity, 0.0) * error for error in curve.errors]
        costs[layer.layer] = [neuron * width for width in curve.widths]
    chosen = cheapest(effects, costs, budget.amount * scale)
    return {layer.layer: layer.curves[0].widths[chosen[layer.layer]] for layer in curves}
