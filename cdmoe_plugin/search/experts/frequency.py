"""Expert selection by how many tokens chose an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import EXPERT_SELECTIONS
from .data import ExpertOrder, SparseLayerData
from .ranking import ranked


@EXPERT_SELECTIONS.register("frequency", "chosen by most tokens", "Muzio et al. 2024, arXiv 2404.05089")
def frequency_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Experts that most calibration tokens chose first; ties to the lower index.

    The activation frequency of SEER-MoE (Muzio et al. 2024, arXiv 2404.05089), counted without gates.
    """
    return ranked(data, num_experts, lambda data: -choice_counts(data))


def choice_counts(data: SparseLayerData) -> Tensor:
    """How many calibration tokens chose each expert, float64 `[N]`."""
    number = data.block.num_experts
    counts = [torch.bincount(call.routing.experts.flatten().cpu(), minlength=number) for call in data.calls]
    return data.processes.total(counts).cpu()
