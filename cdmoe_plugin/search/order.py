"""The order of scores, with ties."""

from __future__ import annotations

from collections.abc import Mapping

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
