"""Expert selection by the L1 norm of an expert's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import EXPERT_SELECTIONS
from .data import ExpertOrder, SparseLayerData
from .ranking import ranked


@EXPERT_SELECTIONS.register("l1", "lowest sum of absolute weights", "CD-MoE, section 4.4")
def l1_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Rank experts by the sum of their absolute weights, the lowest first ("L1" in CD-MoE, section 4.4).

    Ties go to the lower index.
    """
    return ranked(data, num_experts, l1_norms)


@torch.no_grad()
def l1_norms(data: SparseLayerData) -> Tensor:
    """Compute the sum of absolute weights of each expert's matrices (three, or two without gates), float64 `[N]`."""
    matrices = data.block.expert_weights().matrices
    parts = [torch.linalg.vector_norm(part, 1, dim=(1, 2), dtype=torch.float64) for part in matrices]
    return torch.stack(parts).sum(0)
