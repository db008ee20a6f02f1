"""The Jensen-Shannon divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import METRICS
from .probabilities import probabilities


@METRICS.register("js", "Jensen-Shannon divergence of the softmax of both outputs", "CD-MoE, section 3.2")
def js_divergence(target: Tensor, candidate: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of the softmax over the last dimension, in nats (CD-MoE, section 3.2).

    Args:
        target (`Tensor`): Scores `[..., H]`; computed in float32 or wider.
        candidate (`Tensor`): Scores `[..., H]`; `target` is broadcast to its shape.

    Returns:
        `Tensor`: `½ KL(p‖m) + ½ KL(q‖m)`, `m = ½(p + q)`, of shape `[...]`.
    """
    p, log_p = probabilities(target)
    q, log_q = probabilities(candidate)
    log_m = torch.add(0.5 * p, q, alpha=0.5).log_()
    # KL from differences of logarithms: sums of p·log p and q·log q would cancel and leave rounding errors.
    of_q = log_q.sub_(log_m).mul_(q)
    return of_q.addcmul_(p, log_p - log_m).sum(-1).mul_(0.5)
