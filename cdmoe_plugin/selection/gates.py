"""Constant gates for condensed layers (Eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..playback import LayerCall


def mean_gates(calls: Sequence[LayerCall], num_experts: int) -> Tensor:
    """Mean router weight of each expert over the tokens that chose it (CD-MoE, Eq. 2).

    Args:
        calls: A sparse layer on all calibration tokens; padding is in none of them.
        num_experts (`int`): Routed experts N of the layer.

    Returns:
        `Tensor`: float64 `[N]`; NaN for an expert that no token chose, which has no mean and is no candidate.
    """
    sums = torch.zeros(num_experts, dtype=torch.float64)
    counts = torch.zeros(num_experts, dtype=torch.float64)
    for call in calls:
        experts = call.routing.experts.flatten().cpu()
        weights = call.routing.weights.flatten().cpu().double()
        sums.index_add_(0, experts, weights)
        counts.index_add_(0, experts, torch.ones_like(weights))
    return sums / counts


GATES: dict[str, Callable[[Sequence[LayerCall], int], Tensor]] = {"mean": mean_gates}
