"""Expert selection by router-weighted activations (REAP)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...registry import EXPERT_SELECTIONS
from .data import ExpertOrder, RoutedData, SparseLayerData
from .ranking import ranked


@EXPERT_SELECTIONS.register(
    "reap", "highest mean of gate times norm of the output", "Lasby et al. 2025, arXiv 2510.13999"
)
def reap_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Rank experts by their router-weighted activation, the highest first (REAP, Lasby et al. 2025, arXiv 2510.13999).

    The saliency of expert i is the mean of `g_i(x) · ‖E_i(x)‖₂` over the tokens that chose it, where `g_i(x)` is the
    router's weight as it is applied; if it multiplies the expert's input, the mean of `‖E_i(g_i(x) · x)‖₂`. Ties go to
    the lower index.
    """
    return ranked(data, num_experts, lambda data: -reap_saliencies(data))


def reap_saliencies(data: RoutedData) -> Tensor:
    """Compute REAP's saliency of each expert, float64 `[N]`; NaN for an expert that no token chose."""
    return mean_output_norms(data, lambda norms, factors: norms * factors)


@torch.no_grad()
def mean_output_norms(data: RoutedData, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compute the mean over tokens of a function of an expert's output norms and factors.

    Args:
        data (`RoutedData`): The layer on all calibration batches.
        weigh (`Callable`): From norms `[T]` and `output_factors` of the router's weights `[T]`, float64, to `[T]`.

    Returns:
        `Tensor`: float64 `[N]`; NaN for an expert that no token chose.
    """
    parts = []
    for call in data.calls:
        sums = torch.zeros(data.block.num_experts, dtype=torch.float64)
        # Expert by expert: each is chosen by a few tokens only.
        for expert in torch.unique(call.routing.experts).tolist():
            rows, slots = torch.nonzero(call.routing.experts == expert, as_tuple=True)
            inputs, weights = call.inputs[rows], call.routing.weights[rows, slots]
            outputs = data.block.expert_outputs(inputs, [expert], weights[None])[0]
            norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64)
            sums[expert] = float(weigh(norms, data.block.output_factors(weights).double()).sum())
        parts.append(sums)
    return data.processes.total(parts).cpu() / data.choice_counts()
