"""Expert selection by the number of tokens that chose an expert."""

from __future__ import annotations

from ...registry import EXPERT_SELECTIONS
from .data import ExpertOrder, SparseLayerData
from .ranking import ranked


@EXPERT_SELECTIONS.register("frequency", "chosen by the most tokens", "Muzio et al. 2024, arXiv 2404.05089")
def frequency_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Rank experts by the number of calibration tokens that chose them, the most first. Ties go to the lower index.

    This is the activation frequency of SEER-MoE (Muzio et al. 2024, arXiv 2404.05089), counted without gates.
    """
    return ranked(data, num_experts, lambda data: -data.choice_counts())
