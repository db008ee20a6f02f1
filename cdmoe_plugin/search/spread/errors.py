"""The held-out errors of a layer with any number of dense neurons, from sums over tokens, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...condense.refit.ridge import STRENGTHS, ridge_factor
from ...condense.refit.sums import Sums


@dataclass(frozen=True)
class Fits:
    """The best fits along an order of regressors.

    Args:
        errors (`list[float]`): The held-out error of each.
        last (`Tensor`): Coefficients of the last fit, `[n, H]`.
    """

    errors: list[float]
    last: Tensor


def fits_along(numbers: Sequence[int], fit: Sums, held_out: Sums, prior: Tensor, constants: int = 0) -> Fits:
    """Fit the first regressors, for several numbers of them, and measure the errors on held-out tokens.

    Each fit is that of `refit="down_proj"`: ridge regression towards the prior, with the best of its strengths. The
    Cholesky factor of the first regressors is a part of that of all, so each strength needs one factorisation.

    Args:
        numbers (`Sequence[int]`): How many of the W regressors, ascending; the last is W.
        fit (`Sums`): Over the tokens to fit on. Only the lower triangle of its products is read.
        held_out (`Sums`): Over the others.
        prior (`Tensor`): Coefficients of the folded layer, float64 `[W, H]`.
        constants (`int`, defaults to 0): The first regressors are constants, for a bias, which depends on how many
            others there are. It has no prior, and the folded layer is not measured then.

    Returns:
        `Fits`: The errors, as sums over tokens.
    """
    errors, last = prior.new_full((len(numbers),), torch.inf), prior
    if not constants:
        identity = torch.eye(len(prior), dtype=prior.dtype, device=prior.device)
        errors, last = _errors(numbers, held_out, identity, prior)
        del identity
    for strength in STRENGTHS if len(prior) else ():
        inverse, ridge = ridge_factor(fit.products, strength, constants)
        _invert(inverse, numbers)
        found, coefficients = _errors(numbers, held_out, inverse, fit.with_target + ridge * prior)
        if found[-1] < errors[-1]:
            last = coefficients
        errors = torch.minimum(errors, found)
        del inverse, coefficients  # before the next ones are made
    return Fits(errors.clamp_min(0).tolist(), last)


def _invert(factor: Tensor, numbers: Sequence[int]) -> None:
    """Replace a lower triangular `[W, W]` by its inverse, in blocks of rows that end at some numbers."""
    for start, end in zip([0, *numbers], numbers, strict=False):
        rows = factor[start:end]
        identity = torch.eye(end - start, dtype=factor.dtype, device=factor.device)
        own = torch.linalg.solve_triangular(rows[:, start:end], identity, upper=False)
        rows[:, :start] = -own @ (rows[:, :start] @ factor[:start, :start])
        rows[:, start:end] = own


def _errors(numbers: Sequence[int], sums: Sums, inverse: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `sum w (y - a B_n)²` for the first n regressors, for several n.

    Args:
        numbers (`Sequence[int]`): The numbers n, ascending; the last is W.
        sums (`Sums`): The sums over tokens.
        inverse (`Tensor`): The inverse K of the Cholesky factor, lower triangular `[W, W]`.
        right (`Tensor`): The right side R, `[W, H]`: the coefficients are `B_n = K_n^T K_n R_n`, with the first n rows
            and columns.

    Returns:
        The errors, and the coefficients for all regressors.
    """
    coefficients, error, errors = torch.zeros_like(right), sums.size, []
    for start, end in zip([0, *numbers], numbers, strict=False):
        rows = inverse[start:end, :end]
        half = rows @ right[:end]
        # The coefficients change by rows^T half. With G for the products, b^T G b grows by (2 b + change)^T G change.
        product = rows @ sums.products[:end, :end]
        grown = 2 * (product @ coefficients[:end]) + (product @ rows.T) @ half
        error = error + (half * (grown - 2 * (rows @ sums.with_target[:end]))).sum()
        coefficients[:end].addmm_(rows.T, half)
        errors.append(error)
    return torch.stack(errors), coefficients
