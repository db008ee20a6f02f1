"""Scores as probabilities, in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to probabilities inside each KL divergence, as in the published code of CD-MoE.
EPSILON = 1e-10


def probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax over the last dimension and its logarithm, new tensors of the shape of `scores`."""
    p = torch.softmax(wide(scores), dim=-1).add_(EPSILON)
    return p, p.log()


def wide(x: Tensor) -> Tensor:
    """Convert to float32 unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()
