"""Orders of experts by one score per expert, or given ones."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..order import ascending
from .comparison import LayerComparison
from .data import ExpertOrder, SparseLayerData


def ranked(data: SparseLayerData, num_experts: int, score: Callable[[SparseLayerData], Tensor]) -> ExpertOrder:
    """Choose the candidates with the lowest scores, lowest first. Ties go to the lower index.

    Args:
        data (`SparseLayerData`): The sparse layer.
        num_experts (`int`): Number of experts to choose.
        score (`Callable`): Computes the scores of all routed experts, float64 `[N]`; only candidates' are used.
    """
    experts: list[int] = []
    if num_experts:
        values = score(data).tolist()
        experts = ascending({expert: values[expert] for expert in data.candidates})[:num_experts]
    return ordered(data, experts)


def ordered(data: SparseLayerData, experts: list[int]) -> ExpertOrder:
    """Measure the divergences of the layer's output along a given order of experts.

    Raises:
        ValueError: naming the layer, if the output with these experts is not finite.
    """
    scores = LayerComparison(data).along(experts)
    if not all(map(math.isfinite, scores)):
        raise ValueError(
            f"With experts {experts} kept, the output of decoder layer {data.block.layer} contains NaN or infinity. "
            "Check the checkpoint, and try dtype='float32'."
        )
    return ExpertOrder(experts, scores)
