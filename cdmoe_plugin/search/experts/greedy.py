"""Greedy expert selection (Algorithm 1)."""

from __future__ import annotations

from ...registry import EXPERT_SELECTIONS
from ..order import least
from .comparison import LayerComparison
from .data import ExpertOrder, SparseLayerData
from .gram import SquaredErrors


@EXPERT_SELECTIONS.register(
    "greedy", "adds the expert that changes the layer's output least, one after the other", "CD-MoE, Algorithm 1"
)
def greedy_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Add, one after the other, the expert that brings the layer's output nearest to the sparse one (Algorithm 1).

    Each expert's output is computed once, and the rounds only add and compare. Outputs that do not fit into
    `cache_bytes` are computed again in each round, with the same result. If the metric is the squared error and the
    layer adds its block's output to the residual, inner products of the outputs are enough. Ties go to the lower index.
    """
    comparison = (SquaredErrors.of(data) if num_experts else None) or LayerComparison(data)
    experts: list[int] = []
    scores = [comparison.without()]
    steps: list[dict[int, float]] = []
    for _ in range(num_experts):
        divergences = comparison.with_each()
        steps.append({expert: divergences[expert] for expert in data.candidates if expert not in experts})
        best = least(steps[-1])
        experts.append(best)
        scores.append(steps[-1][best])
        comparison.keep(best)
    return ExpertOrder(experts, scores, steps)
