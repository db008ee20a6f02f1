"""The allocation of a total size to layers: the options with the smallest sum of effects within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

# Costs may have a small common divisor. The budget is then at most so many units, and costs are rounded up to them.
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
    """Find the numbers of experts with the smallest sum of effects within a budget; see `cheapest`.

    Args:
        effects (`dict[int, list[float]]`): For each layer, the divergence with 0, 1, 2, ... of its experts.
        costs (`dict[int, int]`): Cost of one expert of each layer, at least 1.
        budget (`int`): Maximum total cost.

    Returns:
        `dict[int, int]`: The number of experts of each layer.
    """
    each = {layer: [costs[layer] * number for number in range(len(values))] for layer, values in effects.items()}
    return cheapest(effects, each, budget)


def cheapest(effects: Mapping[int, Sequence[float]], costs: Mapping[int, Sequence[int]], budget: int) -> dict[int, int]:
    """Choose an option for each layer so that the sum of effects is smallest within a budget.

    If every further step of a layer gained less per cost than the one before, repeatedly taking the largest gain would
    do. But an expert may increase the divergence until the next one is added, so the sum is minimised exactly, by
    dynamic programming over layers. Ties go to options that are listed first, first in the last layers.

    Args:
        effects (`dict[int, list[float]]`): The effect of every option of each layer.
        costs (`dict[int, list[int]]`): Their costs.
        budget (`int`): Maximum total cost. If what is left of it after the least costs is more than 32768 times the
            common divisor of differences, differences are rounded up to a 32768th of it, and what that leaves over is
            spent on the options with the largest gains. The result never costs more than the budget.

    Returns:
        `dict[int, int]`: The index of each layer's option.

    Raises:
        ValueError: if the least costs exceed the budget.
    """
    least = {layer: min(costs[layer]) for layer in effects}
    left = budget - sum(least.values())
    if left < 0:
        raise ValueError(f"The budget is {budget:,}, but the cheapest options cost {budget - left:,}.")
    extra = {layer: [cost - least[layer] for cost in costs[layer]] for layer in effects}
    unit = max(math.gcd(*(cost for each in extra.values() for cost in each)), 1)
    most = min(left, sum(map(max, extra.values())))
    if most // unit > _MOST_UNITS:
        unit = -(-most // _MOST_UNITS)
    steps = {layer: [-(-cost // unit) for cost in each] for layer, each in extra.items()}
    chosen = _solved(effects, steps, most // unit)
    left -= sum(extra[layer][number] for layer, number in chosen.items())
    while better := _affordable(effects, extra, chosen, left):
        _, layer, number = max(better, key=lambda each: each[0])
        left -= extra[layer][number] - extra[layer][chosen[layer]]
        chosen[layer] = number
    return chosen


def _solved(effects: Mapping[int, Sequence[float]], steps: Mapping[int, Sequence[int]], units: int) -> dict[int, int]:
    """Solve the problem exactly for costs in small whole numbers."""
    best = np.zeros(units + 1)  # smallest sum of the layers so far, by available units
    choices = {}
    for layer, values in effects.items():
        total, choice = np.full(units + 1, np.inf), np.zeros(units + 1, dtype=np.int64)
        for number, (value, used) in enumerate(zip(values, steps[layer], strict=True)):
            if used > units:
                continue
            candidate = best[: units + 1 - used] + value
            better = candidate < total[used:]
            total[used:][better] = candidate[better]
            choice[used:][better] = number
        best, choices[layer] = total, choice
    chosen = {}
    for layer in reversed(list(effects)):
        chosen[layer] = int(choices[layer][units])
        units -= steps[layer][chosen[layer]]
    return {layer: chosen[layer] for layer in effects}


def _affordable(
    effects: Mapping[int, Sequence[float]],
    extra: Mapping[int, Sequence[int]],
    chosen: Mapping[int, int],
    left: int,
) -> list[tuple[float, int, int]]:
    """List the gains of better options that can still be paid for, with their layers and indices."""
    return [
        (effects[layer][now] - value, layer, number)
        for layer, now in chosen.items()
        for number, value in enumerate(effects[layer])
        if value < effects[layer][now] and extra[layer][number] - extra[layer][now] <= left
    ]
