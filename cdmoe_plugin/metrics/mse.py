"""The mean squared error."""

from __future__ import annotations

from torch import Tensor

from ..registry import METRICS
from .probabilities import wide


@METRICS.register("mse", "mean squared difference; needs the least time and memory")
def mean_squared_error(target: Tensor, candidate: Tensor) -> Tensor:
    """Squared difference, averaged over the last dimension; shapes as of `js`."""
    return (wide(candidate) - wide(target)).square_().mean(-1)
