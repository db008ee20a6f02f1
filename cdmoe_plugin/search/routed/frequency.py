"""Experts stay by the number of tokens that chose them."""

from __future__ import annotations

from torch import Tensor

from ...registry import ROUTED_SELECTIONS
from ..experts.data import RoutedData


@ROUTED_SELECTIONS.register("frequency", "chosen by the most tokens", "Muzio et al. 2024, arXiv 2404.05089")
def by_frequency(data: RoutedData) -> Tensor:
    """Count the calibration tokens that chose each expert."""
    return data.choice_counts()
