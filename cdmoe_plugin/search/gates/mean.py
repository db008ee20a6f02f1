"""The mean router weight as the constant gate (Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoder.record import LayerCall
from ...processes import Processes
from ...registry import GATES


@GATES.register("mean", "mean router weight over the tokens that chose the expert", "CD-MoE, Eq. 2")
def mean_gates(calls: Sequence[LayerCall], num_experts: int, processes: Processes) -> Tensor:
    """Compute the mean router weight of each expert over the tokens that chose it (CD-MoE, Eq. 2).

    Args:
        calls (`Sequence[LayerCall]`): The sparse layer on this process's calibration batches, without padding.
        num_experts (`int`): Number N of routed experts of the layer.
        processes (`Processes`): All processes of the search.

    Returns:
        `Tensor`: float64 `[N]`; NaN for an expert that no token chose, which has no mean and is not a candidate.
    """
    parts = []
    for call in calls:
        experts = call.routing.experts.flatten().cpu()
        weights = call.routing.weights.flatten().cpu().double()
        sums = torch.zeros(2, num_experts, dtype=torch.float64)
        sums.index_add_(1, experts, torch.stack([weights, torch.ones_like(weights)]))
        parts.append(sums)
    total, counts = processes.total(parts).cpu()
    return total / counts
