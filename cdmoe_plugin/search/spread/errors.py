"""The held-out errors of a layer with any number of dense neurons, from sums over tokens, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...condense.refit.ridge import STRENGTHS


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
    def zeros(cls, width: int, features: int, device: torch.device) -> Sums:
        shapes = ((width, width), (width, features), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def error(self, chosen: Tensor, coefficients: Tensor) -> Tensor:
        """Compute `sum w (y - a B)²` for coefficients B `[n, H]` of the chosen regressors."""
        explained = (coefficients * self.with_target[chosen]).sum()
        return self.size - 2 * explained + (coefficients * (self.products[chosen][:, chosen] @ coefficients)).sum()


@dataclass(frozen=True)
class Fits:
    """The best fits along an order of regressors.

    Args:
        errors (`list[float]`): The held-out error of each.
        last (`Tensor`): Coefficients of the last fit, `[n, H]`.
    """

    errors: list[float]
    last: Tensor


def fits_along(order: Tensor, numbers: Sequence[int], fit: Sums, held_out: Sums, prior: Tensor) -> Fits:
    """Fit the first regressors of an order, for several numbers of them, and measure the errors on held-out tokens.

    Each fit is that of `refit="down_proj"`: ridge regression towards the prior, with the best of its strengths. The
    Cholesky factor of the first regressors is a part of that of all, so each strength needs one factorisation.

    Args:
        order (`Tensor`): Indices of regressors.
        numbers (`Sequence[int]`): How many of them, ascending.
        fit (`Sums`): Over the tokens to fit on.
        held_out (`Sums`): Over the others.
        prior (`Tensor`): Coefficients of the folded layer, float64 `[W, H]`.

    Returns:
        `Fits`: The errors, as sums over tokens.
    """
    order = order[: numbers[-1]]
    products = fit.products[order][:, order]
    scale = products.diagonal().mean().clamp_min(1e-30) if len(order) else products.new_ones(())
    best = [(float(held_out.error(order[:n], prior[order[:n]])), prior[order[:n]]) for n in numbers]
    for strength in STRENGTHS if len(order) else ():
        ridge = strength * scale
        system = products.clone()
        system.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(system)
        half = torch.linalg.solve_triangular(factor, fit.with_target[order] + ridge * prior[order], upper=False)
        for place, n in enumerate(numbers):
            found = torch.linalg.solve_triangular(factor[:n, :n].mT, half[:n], upper=True)
            error = float(held_out.error(order[:n], found))
            if error < best[place][0]:
                best[place] = (error, found)
    return Fits([max(error, 0.0) for error, _ in best], best[-1][1])
