"""Orders by score, with ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Any)

# Scores with a smaller relative difference are tied: rounding depends on an expert's position in a batched product.
TIE = 1e-6


def least(scores: Mapping[Key, float]) -> Key:
    """Return the index of the smallest score. Ties (within a relative 1e-6, float32 rounding) go to the lower index."""
    best = min(scores.values())
    return min(index for index, score in scores.items() if score <= best + TIE * abs(best))


def ascending(scores: Mapping[int, float]) -> list[int]:
    """Return the indices in ascending order of their scores, with ties as in `least`."""
    left, order = dict(scores), []
    while left:
        order.append(least(left))
        del left[order[-1]]
    return order
