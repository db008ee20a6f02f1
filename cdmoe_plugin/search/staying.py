"""The order in which experts stay behind their router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import RoutedPart, SparseBlock
from ..config import CondenseConfig
from ..plan import CondensePlan
from ..registry import ROUTED_SELECTIONS
from .experts.data import SparseLayerData
from .order import ascending


def staying_experts(data: SparseLayerData, config: CondenseConfig) -> list[int] | None:
    """Choose the experts that stay behind the router of a layer, in ascending order; None if none stays.

    Args:
        data (`SparseLayerData`): The layer on all calibration batches.
        config (`CondenseConfig`): `num_routed` and `routed_selection`.
    """
    if not config.num_routed:
        return None
    order = staying_order(ROUTED_SELECTIONS.of(config)(data), RoutedPart(data.block).groups[0])
    return sorted(order[: config.num_routed])


def staying_per_layer(
    request: CondensePlan | CondenseConfig, layers: Sequence[int], blocks: Sequence[SparseBlock]
) -> dict[int, list[int]]:
    """Return the experts that stay in each of these layers, if any; before a search, any of the right number."""
    if isinstance(request, CondensePlan):
        return {row.layer: row.routed for row in request.layers if row.routed and row.layer in layers}
    found = {}
    for block in blocks if request.num_routed else ():
        order = staying_order(torch.zeros(block.num_experts), RoutedPart(block).groups[0])
        found[block.layer] = sorted(order[: request.num_routed])
    return {layer: found[layer] for layer in layers if layer in found}


def staying_order(scores: Tensor, groups: int = 1) -> list[int]:
    """Put the experts of a layer in the order in which they stay: by score, the highest first.

    Of a router with groups, the best experts of all groups come first, then the second best, and so on, so that the
    beginning of the order has the same number of each group.

    Args:
        scores (`Tensor`): A score for each expert, `[N]`; NaN for those to go first. Ties go to the lower index.
        groups (`int`, defaults to 1): Number of the router's groups, of neighbouring experts.
    """
    size = len(scores) // groups
    known = torch.where(scores.isnan(), -torch.inf, scores.double()).tolist()
    ranked = [ascending({e: -known[e] for e in range(g * size, (g + 1) * size)}) for g in range(groups)]
    order: list[int] = []
    for rank in zip(*ranked, strict=True):
        order += ascending({expert: -known[expert] for expert in rank})
    return order
