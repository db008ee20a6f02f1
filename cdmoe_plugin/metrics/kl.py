"""The Kullback-Leibler divergence."""

from __future__ import annotations

from torch import Tensor

from ..registry import METRICS
from .probabilities import probabilities


@METRICS.register("kl", "Kullback-Leibler divergence of the softmax of both outputs", "CD-MoE, section 4.4")
def kl_divergence(target: Tensor, candidate: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence `KL(p‖q)` of the softmax over the last dimension, in nats.

    Shapes and dtypes as in `js_divergence`.
    """
    p, log_p = probabilities(target)
    _, log_q = probabilities(candidate)
    return log_q.neg_().add_(log_p).mul_(p).sum(-1)
