"""Expert selection by one number per expert: baselines of CD-MoE (section 4.4), routing frequency, and REAP."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
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


def random_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Experts in random order ("Random" in CD-MoE, section 4.4), drawn from the seed and the decoder layer.

    All N experts are shuffled and those that are no candidates left out. There are no ties.
    """
    shuffled = list(range(data.block.num_experts))
    random.Random(f"{data.seed} {data.block.layer}").shuffle(shuffled)
    candidates = set(data.candidates)
    return ordered(data, [expert for expert in shuffled if expert in candidates][:num_experts])


def l1_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Experts with the lowest sum of absolute weights first ("L1" in CD-MoE, section 4.4); ties to the lower index."""
    return ranked(data, num_experts, l1_norms)


def frequency_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Experts that most calibration tokens chose first; ties to the lower index.

    The activation frequency of SEER-MoE (Muzio et al. 2024, arXiv 2404.05089), counted without gates.
    """
    return ranked(data, num_experts, lambda data: -choice_counts(data))


def reap_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Experts with the highest router-weighted activation first (REAP, Lasby et al. 2025, arXiv 2510.13999).

    The saliency of expert i is the mean, over the tokens that chose it, of `g_i(x) · ‖E_i(x)‖₂`, where `g_i(x)` is what
    the router really multiplies with; where that is the expert's input, the mean of `‖E_i(g_i(x) · x)‖₂`. Ties go to
    the lower index.
    """
    return ranked(data, num_experts, lambda data: -reap_saliencies(data))


@torch.no_grad()
def l1_norms(data: SparseLayerData) -> Tensor:
    """Sum of the absolute weights of each expert's matrices (three, two without gates), float64 `[N]`."""
    matrices = data.block.expert_weights().matrices
    parts = [torch.linalg.vector_norm(part, 1, dim=(1, 2), dtype=torch.float64) for part in matrices]
    return torch.stack(parts).sum(0)


def choice_counts(data: SparseLayerData) -> Tensor:
    """How many calibration tokens chose each expert, float64 `[N]`."""
    number = data.block.num_experts
    counts = [torch.bincount(call.routing.experts.flatten().cpu(), minlength=number) for call in data.calls]
    return data.processes.total(counts).cpu()


@torch.no_grad()
def reap_saliencies(data: SparseLayerData) -> Tensor:
    """REAP's saliency of each expert, float64 `[N]`; NaN for an expert that no token chose."""
    parts = []
    for call in data.calls:
        sums = torch.zeros(data.block.num_experts, dtype=torch.float64)
        # Expert by expert, as only a few of all tokens chose it.
        for expert in torch.unique(call.routing.experts).tolist():
            rows, slots = torch.nonzero(call.routing.experts == expert, as_tuple=True)
            inputs, weights = call.inputs[rows], call.routing.weights[rows, slots]
            outputs = data.block.expert_outputs(inputs, [expert], weights[None])[0]
            norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64)
            sums[expert] = float(norms @ data.block.output_factors(weights).double())
        parts.append(sums)
    return data.processes.total(parts).cpu() / choice_counts(data)
