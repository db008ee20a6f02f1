"""Expert selection for diversity: experts whose contributions together span the largest volume (D-optimal)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import EXPERT_SELECTIONS
from ..order import least
from .data import ExpertOrder, SparseLayerData
from .gram import gram_matrix
from .ranking import ordered

# Ridge as a share of the candidates' mean squared contribution: far above the rounding of the outputs, and far below
# what tells two experts apart.
_RIDGE = 1e-4


@EXPERT_SELECTIONS.register(
    "d_optimal",
    "adds the expert that most enlarges the volume that the kept ones' outputs span",
    "after Kim et al. 2026, arXiv 2605.28207",
)
def d_optimal_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Adds, one after the other, the expert that most enlarges the volume that the kept ones' outputs span.

    After the diversity-aware scoring of Kim et al. 2026 (arXiv 2605.28207), which weights expert outputs by the mean
    routing probability and picks a D-optimal subset. What exactly is computed here: `v_i = g_i E_i(x)` on all
    calibration tokens, each weighted as in the divergences, is what expert i would add to the condensed layer's output;
    G is the Gram matrix of the `v_i`; the next expert maximises `log det(G_S + ε I)` of the kept set S, where ε is 1e-4
    times the mean of G's diagonal over the candidates. Ties go to the lower index.
    """
    experts: list[int] = []
    if num_experts:
        gram = gram_matrix(data)[data.candidates][:, data.candidates]
        if not bool(torch.isfinite(gram).all()):
            raise ValueError(
                f"The output of an expert of decoder layer {data.block.layer} contains NaN or infinity. Check the "
                "checkpoint, and try dtype='float32'."
            )
        experts = [data.candidates[i] for i in largest_volume(gram, num_experts)]
    return ordered(data, experts)


def largest_volume(gram: Tensor, number: int) -> list[int]:
    """Which rows maximise `log det(G_S + ε I)`, one after the other: a pivoted Cholesky decomposition.

    Adding row i multiplies the determinant by what is left of `G_ii + ε` once the chosen rows are projected out.

    Args:
        gram (`Tensor`): G, float64 `[n, n]`, positive semidefinite.
        number (`int`): How many rows, at most n.
    """
    left = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    chosen: list[int] = []
    for _ in range(number):
        pivots = left.diagonal().tolist()
        best = least({i: -pivot for i, pivot in enumerate(pivots) if i not in chosen})
        chosen.append(best)
        if pivots[best] > 0:  # else nothing is left to project out
            left = left - torch.outer(left[:, best], left[:, best]) / left[best, best]
    return chosen
