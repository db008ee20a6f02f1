"""Orders of experts by one number per expert, or known ones."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..order import ascending
from .comparison import LayerComparison
from .data import ExpertOrder, SparseLayerData


def ranked(data: SparseLayerData, num_experts: int, score: Callable[[SparseLayerData], Tensor]) -> ExpertOrder:
    """The candidates with the lowest scores, lowest first; ties go to the lower index.

    Args:
        score (`Callable`): Gives float64 `[N]`, one number per routed expert; those of no candidate are not looked at.
    """
    experts: list[int] = []
    if num_experts:
        values = score(data).tolist()
        experts = ascending({expert: values[expert] for expert in data.candidates})[:num_experts]
    return ordered(data, experts)


def ordered(data: SparseLayerData, experts: list[int]) -> ExpertOrder:
    """An order that is known, with the divergences of the layer's output along it.

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
