"""How many experts each layer keeps when a total is given: where they are worth most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

# Layers of different sizes may have no common unit that is large: costs are then rounded up to so many units at most.
_MOST_UNITS = 2**15


def estimated_effects(
    alone: Mapping[int, float], own: Mapping[int, Sequence[float]], uniform: Mapping[int, int]
) -> dict[int, list[float]]:
    """What each layer with 0, 1, 2, ... experts does to the model's output, as far as can be told without running it.

    `D_l(K) · e_l(k) / e_l(K)`: the layer's own divergence, scaled to what the layer did to the model at one K.

    Args:
        alone (`dict[int, float]`): D_l, divergence of the model's output when layer l alone is condensed to K experts.
        own (`dict[int, list[float]]`): e_l, divergence of the layer's own output with 0, 1, 2, ... experts.
        uniform (`dict[int, int]`): K of each layer.
    """
    at = {layer: own[layer][uniform[layer]] for layer in own}
    factors = {layer: max(alone[layer], 0.0) / at[layer] for layer in own if at[layer] > 0}
    # A layer that is perfect at K says nothing about its weight: take that of the others.
    usual = fmean(factors.values()) if factors else 1.0
    return {layer: [factors.get(layer, usual) * value for value in values] for layer, values in own.items()}


def allocate(effects: Mapping[int, Sequence[float]], costs: Mapping[int, int], budget: int) -> dict[int, int]:
    """Numbers of experts whose effects have the smallest sum within a budget.

    Where every further expert of a layer gains less than the one before, this is what taking the largest gain per cost,
    time and again, comes to; but a single expert may do harm of which the next makes up, so the sum is minimised
    exactly, by dynamic programming over layers. Ties go to fewer experts, first in the layers that come last.

    Args:
        effects (`dict[int, list[float]]`): For each layer, what 0, 1, 2, ... of its experts leave to be desired.
        costs (`dict[int, int]`): Cost of one expert of each layer, at least 1.
        budget (`int`): What all may cost. Costs that differ are rounded up to a 32768th of it, where that is more than
            their common divisor; the result never costs more than the budget.

    Returns:
        `dict[int, int]`: The number of experts of each layer.
    """
    unit = max(math.gcd(*(costs[layer] for layer in effects)), 1)
    if budget // unit > _MOST_UNITS and len({costs[layer] for layer in effects}) > 1:
        unit = max(unit, -(-budget // _MOST_UNITS))
    steps = {layer: -(-costs[layer] // unit) for layer in effects}
    # No more units than all experts together could use.
    units = min(budget // unit, sum(steps[layer] * (len(values) - 1) for layer, values in effects.items()))
    best = np.zeros(units + 1)  # smallest sum of the layers so far, by units that may be used
    choices = {}
    for layer, values in effects.items():
        total, choice = best + values[0], np.zeros(units + 1, dtype=np.int64)
        for number in range(1, min(len(values) - 1, units // steps[layer]) + 1):
            used = number * steps[layer]
            candidate = best[: units + 1 - used] + values[number]
            better = candidate < total[used:]
            total[used:][better] = candidate[better]
            choice[used:][better] = number
        best, choices[layer] = total, choice
    kept = {}
    for layer in reversed(list(effects)):
        kept[layer] = int(choices[layer][units])
        units -= kept[layer] * steps[layer]
    return {layer: kept[layer] for layer in effects}
