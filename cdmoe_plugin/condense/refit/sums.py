"""Sums over tokens that determine the error of any linear function of some activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .ridge import add_products


@dataclass
class Sums:
    """Sums over tokens that determine the error of any down projection. W regressors explain a target of H features.

    With activations `a` `[T, W]`, a target `y` `[T, H]` and token weights `w`, in float64:

    Args:
        products (`Tensor`): `a^T w a`, `[W, W]`.
        with_target (`Tensor`): `a^T w y`, `[W, H]`.
        size (`Tensor`): `sum w y²`, a scalar.
    """

    products: Tensor
    with_target: Tensor
    size: Tensor

    @classmethod
    def zeros(cls, width: int, features: int, targets: int, device: torch.device) -> Sums:
        """Make sums without tokens, for several targets side by side: their features together, a size of each."""
        shapes = ((width, width), (width, features), (targets,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, inner: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add tokens, with activations `[T, W]`, targets `[T, features]` and weights `[T]`, in float64."""
        weighted = inner * weights[:, None]
        add_products(self.products, inner, weighted)
        self.with_target.addmm_(weighted.T, targets)
        self.size.add_(weights @ targets.square().unflatten(1, (len(self.size), -1)).sum(2))

    def apart(self) -> Iterator[Sums]:
        """Yield the sums of each target, which share the products."""
        parts = zip(self.with_target.chunk(len(self.size), 1), self.size, strict=True)
        yield from (Sums(self.products, with_target, size) for with_target, size in parts)

    def of(self, order: Tensor) -> Sums:
        """Return the sums for some regressors alone, in an order."""
        return Sums(self.products[order[:, None], order], self.with_target[order], self.size)
