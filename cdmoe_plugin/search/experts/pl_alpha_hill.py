"""Expert selection by the tails of the spectra of an expert's weights (PL-Alpha-Hill)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import EXPERT_SELECTIONS
from .data import ExpertOrder, SparseLayerData
from .ranking import ranked

# Bins of the histogram between the logarithms of the smallest and the largest eigenvalue.
_BINS = 100
# Float64 elements of the Gram matrices in memory at once: half a gigabyte.
_GRAM_ELEMENTS = 2**26


@EXPERT_SELECTIONS.register("pl_alpha_hill", "heaviest tail of the weights' spectra", "CD-MoE, Eq. 4")
def pl_alpha_hill_experts(data: SparseLayerData, num_experts: int) -> ExpertOrder:
    """Rank experts by the PL-Alpha-Hill of their weights, the lowest (heaviest tail) first (CD-MoE, Eq. 4).

    An expert's value is the mean over its three matrices (two without gates), see `pl_alpha_hill`. Ties go to the lower
    index.
    """
    return ranked(data, num_experts, alpha_means)


def alpha_means(data: SparseLayerData) -> Tensor:
    """Compute the mean PL-Alpha-Hill of each expert's matrices, float64 `[N]`; NaN for non-candidates."""
    means = torch.full((data.block.num_experts,), float("nan"), dtype=torch.float64)
    spectra = [_spectra(part, data.candidates) for part in data.block.expert_weights().matrices]
    for expert, *own in zip(data.candidates, *spectra, strict=True):
        means[expert] = sum(map(pl_alpha_hill, own)) / len(own)
    return means


def pl_alpha_hill(eigenvalues: Tensor) -> float:
    """Compute the PL-Alpha-Hill of one spectrum (CD-MoE, Eq. 4): `1 + k / sum_{i=1..k} ln(λ_{n-i+1} / λ_{n-k})`.

    k is chosen by Fix-Finger (Yang et al. 2023, arXiv 2202.02842; Zhou et al. 2024, arXiv 2312.00359): the threshold
    `λ_{n-k}` is at the peak of the empirical spectral density. Here it is the smallest eigenvalue in the fullest of 100
    bins of equal width in log λ (the lowest such bin), without eigenvalues that are zero up to rounding. (The code of
    these papers searches a window around that bin's edge for the best fit instead.)

    Args:
        eigenvalues (`Tensor`): float64 `[n]`, the eigenvalues of `WᵀW` (squared singular values of W), ascending.

    Returns:
        `float`: At least 1. Infinity, as for a tail that is not heavy, if no eigenvalue exceeds the threshold.
    """
    rounding = torch.finfo(torch.float64).eps * len(eigenvalues) * float(eigenvalues[-1])
    logs = eigenvalues[eigenvalues > rounding].log()
    if len(logs) == 0 or logs[0] == logs[-1]:
        return float("inf")
    bins = ((logs - logs[0]) * (_BINS / (logs[-1] - logs[0]))).long().clamp(max=_BINS - 1)
    counts = torch.bincount(bins, minlength=_BINS)
    peak = int(torch.nonzero(counts == counts.max())[0])  # argmax may return any of several maxima
    start = int(torch.nonzero(bins == peak)[0])
    tail = logs[start + 1 :] - logs[start]
    total = float(tail.sum())
    return 1.0 + len(tail) / total if total > 0 else float("inf")


@torch.no_grad()
def _spectra(weights: Tensor, experts: list[int]) -> list[Tensor]:
    """Compute the eigenvalues of `WᵀW` for some of the stacked matrices `[N, A, B]`: float64 `[min(A, B)]`, on the CPU.

    They are those of the smaller of the two Gram matrices, up to zeros.
    """
    smaller = weights if weights.shape[1] <= weights.shape[2] else weights.mT
    step = max(1, _GRAM_ELEMENTS // smaller.shape[1] ** 2)
    spectra: list[Tensor] = []
    for start in range(0, len(experts), step):
        wide = smaller[experts[start : start + step]].double()
        spectra += torch.linalg.eigvalsh(wide @ wide.mT).cpu()
    return spectra
