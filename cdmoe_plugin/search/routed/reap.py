"""Experts stay by their router-weighted activation."""

from __future__ import annotations

from torch import Tensor

from ...registry import ROUTED_SELECTIONS
from ..experts.data import RoutedData
from ..experts.reap import reap_saliencies


@ROUTED_SELECTIONS.register(
    "reap", "highest mean of gate times norm of the output", "Lasby et al. 2025, arXiv 2510.13999"
)
def by_reap(data: RoutedData) -> Tensor:
    """Compute REAP's saliency of each expert."""
    return reap_saliencies(data)
