"""Expert selection: which routed experts a condensed layer keeps, by Algorithm 1 or by one of its alternatives.

Only candidates may be kept, that is experts that a calibration token chose. Every order is nested: the choice for
K - 1 experts is the beginning of that for K.
"""

from __future__ import annotations

from collections.abc import Callable

from ..order import least
from .comparison import LayerComparison
from .d_optimal import d_optimal_experts
from .data import ExpertOrder, SparseLayerData
from .gram import SquaredErrors
from .pl_alpha_hill import pl_alpha_hill_experts
from .ranking import frequency_experts, l1_experts, random_experts, reap_experts


def greedy_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Adds, one after the other, the expert that brings the layer's output nearest (CD-MoE, Algorithm 1).

    Each expert's output is computed once and the rounds only add and compare; what does not fit into `cache_bytes`
    is computed again in each round, with the same result. Where the metric is the squared error and the layer adds its
    block's output to what it has, inner products of the outputs take their place. Ties go to the lower index.
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


EXPERT_SELECTIONS: dict[str, Callable[[SparseLayerData, int], ExpertOrder]] = {
    "greedy": greedy_experts,
    "random": random_experts,
    "l1": l1_experts,
    "pl_alpha_hill": pl_alpha_hill_experts,
    "frequency": frequency_experts,
    "reap": reap_experts,
    "d_optimal": d_optimal_experts,
}
