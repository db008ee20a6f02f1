"""Expert selection for diversity: the experts whose contributions span the largest volume (D-optimal)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import EXPERT_SELECTIONS
from ..order import least
from .data import ExpertOrder, SparseLayerData
from .gram import gram_matrix
from .ranking import ordered

# Ridge relative to the candidates' mean squared contribution: far above the rounding of the outputs, and far below the
# differences between experts.
_RIDGE = 1e-4


@EXPERT_SELECTIONS.register(
    "d_optimal",
    "adds the expert that most enlarges the volume spanned by the outputs of the kept ones",
    "after Kim et al. 2026, arXiv 2605.28207",
)
def d_optimal_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Add, one after the other, the expert that most enlarges the volume spanned by the outputs of the kept ones.

    After the diversity-aware scoring of Kim et al. 2026 (arXiv 2605.28207), which weights expert outputs by the mean
    routing probability and picks a D-optimal subset. In detail: `v_i = g_i E_i(x)` is the contribution of expert i to
    the condensed layer's output on all calibration tokens, weighted as in the divergences, and G is the Gram matrix of
    the `v_i`. The next expert maximises `log det(G_S + ε I)` of the kept set S, where ε is 1e-4 times the mean of G's
    diagonal over the candidates. Ties go to the lower index.
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
    """Choose the rows that maximise `log det(G_S + ε I)`, one after the other, by pivoted Cholesky decomposition.

    Adding row i multiplies the determinant by the rest of `G_ii + ε` after the chosen rows are projected out.

    Args:
        gram (`Tensor`): G, float64 `[n, n]`, positive semidefinite.
        number (`int`): Number of rows, at most n.
    """
    left = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    chosen: list[int] = []
    for _ in range(number):
        pivots = left.diagonal().tolist()
        best = least({i: -pivot for i, pivot in enumerate(pivots) if i not in chosen})
        chosen.append(best)
        if pivots[best] > 0:  # otherwise there is nothing to project out
            left = left - torch.outer(left[:, best], left[:, best]) / left[best, best]
    return chosen
