"""Which experts and layers are kept, and with which gates: Algorithms 1 and 2 of CD-MoE, and what may replace them.

A method is a function in one of the registries: `gates.GATES`, `experts.EXPERT_SELECTIONS`,
`layers.LAYER_SELECTIONS`, and `divergence.METRICS` and `outputs.MODEL_METRICS` for what they minimise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


# Scores so near to each other are equal but for rounding, which depends on an expert's place in a batched product.
_TIE = 1e-6


def least(scores: Mapping[int, float]) -> int:
    """The index of the smallest score; ties (to a relative 1e-6, the rounding of float32) go to the lower index."""
    best = min(scores.values())
    return min(index for index, score in scores.items() if score <= best + _TIE * abs(best))


def ascending(scores: Mapping[int, float]) -> list[int]:
    """The indices in the order of their scores, smallest first, ties as in `least`."""
    left, order = dict(scores), []
    while left:
        order.append(least(left))
        del left[order[-1]]
    return order


def lookup(registry: Mapping[str, T], name: str, field: str) -> T:
    """The method registered under a name.

    Raises:
        ValueError: naming the config field and the methods that exist, if there is none of that name.
    """
    if name not in registry:
        raise ValueError(f"`{field}` is {name!r}, but only {', '.join(map(repr, registry))} exist.")
    return registry[name]
