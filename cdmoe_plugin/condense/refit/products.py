"""Products of activations, summed over tokens: of large layers, they take most of the time of a fit."""

from __future__ import annotations

import torch
from torch import Tensor

# Symmetric products are summed in so many blocks of rows, each of at least so many.
_BLOCKS = 8
_LEAST_BLOCK = 256
# Compute capabilities of the GPUs that compute float64 at half the rate of float32 (P100, V100, A100, H100, B200). Most
# others compute it at a 64th of that rate.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which to compute products of some tokens, which are then added to sums in float64.

    It is float64, or float32 on GPUs that are slow at float64. Sums of many tokens and what is solved from them stay in
    float64: there, rounding decides.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) not in _FAST_FLOAT64:
        return torch.float32
    return torch.float64


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left^T right` of some tokens to sums, in place.

    Args:
        sums (`Tensor`): float64 `[A, B]`.
        left (`Tensor`): `[T, A]`, in the `product_dtype`.
        right (`Tensor`): `[T, B]`, in the same.
    """
    if left.dtype == sums.dtype:
        sums.addmm_(left.T, right)
    else:
        sums.add_(left.T @ right)


def add_products(sums: Tensor, inner: Tensor, weighted: Tensor) -> None:
    """Add `inner^T weighted` to symmetric sums, where `weighted` is `inner` times a weight of each token.

    Only one triangle is computed, in blocks of rows.

    Args:
        sums (`Tensor`): float64 `[W, W]`; changed in place.
        inner (`Tensor`): Activations, `[T, W]`, in the `product_dtype`.
        weighted (`Tensor`): `[T, W]`, in the same.
    """
    size = max(_LEAST_BLOCK, -(-len(sums) // _BLOCKS))
    for start in range(0, len(sums), size):
        rows = slice(start, start + size)
        add_product(sums[rows, start:], inner[:, rows], weighted[:, start:])
        sums[start + size :, rows] = sums[rows, start + size :].T
