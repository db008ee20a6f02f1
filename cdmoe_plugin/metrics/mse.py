"""The mean squared error."""

from __future__ import annotations

from torch import Tensor

from ..registry import METRICS
from .probabilities import wide


@METRICS.register("mse", "mean squared difference; needs the least time and memory")
def mean_squared_error(target: Tensor, candidate: Tensor) -> Tensor:
    """Compute the mean squared difference over the last dimension. Shapes and dtypes as in `js_divergence`."""
    return (wide(candidate) - wide(target)).square_().mean(-1)
