"""The held-out errors of a layer with any number of dense neurons, from sums over tokens, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...condense.refit.ridge import STRENGTHS, add_products


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
        return Sums(self.products[order][:, order], self.with_target[order], self.size)

    def over(self, factor: Tensor) -> Sums:
        """Return the sums for the regressors `a factor^-T`, with a lower triangular `[W, W]`.

        Each new regressor is a combination of those up to its place.
        """
        products = torch.linalg.solve_triangular(factor, self.products, upper=False)
        products = torch.linalg.solve_triangular(factor, products.mT, upper=False)
        return Sums(products, torch.linalg.solve_triangular(factor, self.with_target, upper=False), self.size)


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
    fit, held_out, prior = fit.of(order := order[: numbers[-1]]), held_out.of(order), prior[order]
    errors, last = _errors(held_out, numbers, prior), prior
    scale = fit.products.diagonal().mean().clamp_min(1e-30) if len(order) else fit.size
    for strength in STRENGTHS if len(order) else ():
        ridge = strength * scale
        factor = fit.products.clone()
        factor.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(factor)
        # The coefficients of the first n regressors are the solution of factor[:n, :n]^T B = half[:n].
        half = torch.linalg.solve_triangular(factor, fit.with_target + ridge * prior, upper=False)
        found = _errors(held_out.over(factor), numbers, half)
        if found[-1] < errors[-1]:
            last = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        errors = torch.minimum(errors, found)
    return Fits(errors.clamp_min(0).tolist(), last)


def _errors(sums: Sums, numbers: Sequence[int], coefficients: Tensor) -> Tensor:
    """Compute `sum w (y - a B)²` for the first n rows of coefficients B `[W, H]` and regressors, for several n."""
    explained = (coefficients * sums.with_target).sum(1)
    # The quadratic form of the first n is a sum over the first n rows and columns; of its lower triangle, over rows.
    squares = (coefficients @ coefficients.T).mul_(sums.products).tril_()
    squares = 2 * squares.sum(1) - squares.diagonal()
    along = torch.cat([explained.new_zeros(1), (squares - 2 * explained).cumsum(0)])
    return sums.size + along[torch.tensor(numbers, device=along.device)]
