"""The allocation of a total number of experts to layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

# The costs of layers of different sizes may have a small common divisor. The budget is then at most so many units, and
# costs are rounded up to them.
_MOST_UNITS = 2**15


def estimated_effects(
    alone: Mapping[int, float], own: Mapping[int, Sequence[float]], uniform: Mapping[int, int]
) -> dict[int, list[float]]:
    """Estimate the divergence of the model's output when each layer keeps 0, 1, 2, ... experts, without running it.

    The estimate is `D_l(K) · e_l(k) / e_l(K)`: the layer's own divergence, scaled to that of the model at one K.

    Args:
        alone (`dict[int, float]`): D_l, divergence of the model's output when layer l alone is condensed to K experts.
        own (`dict[int, list[float]]`): e_l, divergence of the layer's own output with 0, 1, 2, ... experts.
        uniform (`dict[int, int]`): K of each layer.
    """
    at = {layer: own[layer][uniform[layer]] for layer in own}
    factors = {layer: max(alone[layer], 0.0) / at[layer] for layer in own if at[layer] > 0}
    # A layer without any divergence at K has no scale of its own: use the mean of the others.
    usual = fmean(factors.values()) if factors else 1.0
    return {layer: [factors.get(layer, usual) * value for value in values] for layer, values in own.items()}


def allocate(effects: Mapping[int, Sequence[float]], costs: Mapping[int, int], budget: int) -> dict[int, int]:
    """Find the numbers of experts with the smallest sum of effects within a budget.

    If every further expert of a layer gained less than the one before, repeatedly taking the largest gain per cost
    would do. But an expert may increase the divergence until the next one is added, so the sum is minimised exactly, by
    dynamic programming over layers. Ties go to fewer experts, first in the last layers.

    Args:
        effects (`dict[int, list[float]]`): For each layer, the divergence with 0, 1, 2, ... of its experts.
        costs (`dict[int, int]`): Cost of one expert of each layer, at least 1.
        budget (`int`): Maximum total cost. Different costs are rounded up to a 32768th of it if that is more than their
            common divisor; the result never costs more than the budget.

    Returns:
        `dict[int, int]`: The number of experts of each layer.
    """
    unit = max(math.gcd(*(costs[layer] for layer in effects)), 1)
    if budget // unit > _MOST_UNITS and len({costs[layer] for layer in effects}) > 1:
        unit = max(unit, -(-budget // _MOST_UNITS))
    steps = {layer: -(-costs[layer] // unit) for layer in effects}
    # At most the units that all experts together cost.
    units = min(budget // unit, sum(steps[layer] * (len(values) - 1) for layer, values in effects.items()))
    best = np.zeros(units + 1)  # smallest sum of the layers so far, by available units
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
