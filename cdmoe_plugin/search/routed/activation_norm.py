"""Experts stay by the mean norm of their outputs."""

from __future__ import annotations

from torch import Tensor

from ...registry import ROUTED_SELECTIONS
from ..experts.data import RoutedData
from ..experts.reap import mean_output_norms


@ROUTED_SELECTIONS.register("activation_norm", "highest mean norm of the output, without the router's weight")
def by_activation_norm(data: RoutedData) -> Tensor:
    """Compute the mean of `‖E_i(x)‖₂` over the tokens that chose an expert, without its gate on the output."""
    return mean_output_norms(data, lambda norms, _factors: norms)
