"""The refit of the down projection in closed form: ridge regression towards the folded one."""

from __future__ import annotations

import torch
from torch import Tensor

from ...blocks import patched_forward
from ...model.layers_cdmoe import CondensedMLP
from ...processes import Processes
from ...registry import REFITS
from .examples import Example, LayerExamples, RefitLayer

# The candidate ridge strengths, relative to the mean square of an inner activation.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Symmetric products are summed in so many blocks of rows, each of at least so many.
_BLOCKS = 8
_LEAST_BLOCK = 256


class NormalEquations:
    """Sums over tokens that determine the error of any change of the down projection. W is the layer's width.

    With inner activations `a` `[T, W]` (if the down projection has a bias, after a constant 1), residuals `r` `[T, H]`
    and token weights `w`, the sums are `a^T w a` `[W, W]`, `a^T w r` `[W, H]`, `sum w r²` and `sum w y²`, in float64.
    Memory does not grow with T. With products in float32, which many GPUs compute faster, rounding exceeds the smaller
    ridges, and solving fails.
    """

    def __init__(self, mlp: CondensedMLP) -> None:
        self.mlp = mlp
        self.coefficients = coefficients(mlp)
        self.products = self.coefficients.new_zeros(len(self.coefficients), len(self.coefficients))
        self.rest = torch.zeros_like(self.coefficients)
        self.error = self.products.new_zeros(())
        self.size = self.products.new_zeros(())

    def add(self, example: Example) -> None:
        """Add some tokens to the sums."""
        for part in example.split(self.mlp.intermediate_size):
            inner = regressors(self.mlp, part.inputs)
            weights = part.weights.double()[:, None]
            left = part.target.double() - inner @ self.coefficients
            add_products(self.products, inner, inner * weights)
            self.rest.addmm_(inner.T, left * weights)
            self.error += (left.square() * weights).sum()
            self.size += (part.target.double().square() * weights).sum()

    def solve(self, strength: float) -> Tensor:
        """Solve the ridge regression for the change of the bias, if any, and of the transposed down projection."""
        factor = ridge_factor(self.products, strength, len(self.products) - self.mlp.intermediate_size)[0]
        half = torch.linalg.solve_triangular(factor, self.rest, upper=False)  # unlike cholesky_solve, without a copy
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)

    def error_with(self, change: Tensor) -> float:
        """Compute `sum w r²` after a change of the coefficients."""
        return float(self.error - 2 * (change * self.rest).sum() + (change * (self.products @ change)).sum())

    def add_up(self, processes: Processes) -> None:
        """Replace the sums over the tokens of each process by those over all tokens."""
        processes.add_up(self.products, self.rest, self.error, self.size)

    def __iadd__(self, other: NormalEquations) -> NormalEquations:
        for name in ("products", "rest", "error", "size"):
            getattr(self, name).add_(getattr(other, name))
        return self


@REFITS.register("down_proj", "the down projection by ridge regression, in closed form")
@torch.no_grad()
def refit_down_proj(mlp: CondensedMLP, examples: LayerExamples) -> RefitLayer:
    """Fit the down projection of a layer, with its bias, to its target by ridge regression, in closed form.

    The ridge strength is chosen from `STRENGTHS` on held-out sequences, and the final fit uses all sequences. If no
    strength improves on the folded layer, the layer is not changed.

    Args:
        mlp (`CondensedMLP`): The folded layer. Only its down projection is changed, in place.
        examples (`LayerExamples`): Inputs and targets.
    """
    fit, held_out = NormalEquations(mlp), NormalEquations(mlp)
    for to_fit, to_choose in examples.both():
        fit.add(to_fit)
        held_out.add(to_choose)
    fit.add_up(examples.processes)
    held_out.add_up(examples.processes)
    errors = {strength: held_out.error_with(fit.solve(strength)) for strength in STRENGTHS if len(fit.products)}
    before, size = float(held_out.error), max(float(held_out.size), 1e-30)
    strength = min(errors, key=lambda s: errors[s], default=None)
    if strength is None or not errors[strength] < before:
        return RefitLayer(before / size, before / size)
    fit += held_out
    set_coefficients(mlp, fit.coefficients + fit.solve(strength))
    return RefitLayer(before / size, errors[strength] / size, strength)


def coefficients(mlp: CondensedMLP) -> Tensor:
    """Return the transposed down projection, float64 `[W, H]`, after its bias, if it has one."""
    weight, bias = mlp.down_proj.weight.T.double(), mlp.down_proj.bias
    return weight if bias is None else torch.cat([bias[None].double(), weight])


def set_coefficients(mlp: CondensedMLP, values: Tensor) -> None:
    """Set the down projection, and its bias, if it has one, from `coefficients`."""
    weight, bias = mlp.down_proj.weight, mlp.down_proj.bias
    if bias is not None:
        bias.copy_(values[0].to(bias.dtype))
    weight.copy_(values[int(bias is not None) :].T.to(weight.dtype))


def regressors(mlp: CondensedMLP, x: Tensor) -> Tensor:
    """Compute what `coefficients` are multiplied by, float64 `[T, W]`: inner activations, for a bias after a 1."""
    inner = inner_activations(mlp, x).double()
    return inner if mlp.down_proj.bias is None else torch.cat([inner.new_ones(len(inner), 1), inner], 1)


def inner_activations(mlp: CondensedMLP, x: Tensor) -> Tensor:
    """Compute the input of a condensed MLP's down projection, `[T, W]` in the dtype of `x`."""
    with patched_forward(mlp.down_proj, lambda inner: inner):
        return mlp.sum_of_experts(x)


def ridge_factor(products: Tensor, strength: float, constants: int) -> tuple[Tensor, Tensor]:
    """Compute the Cholesky factor of products of regressors, `[W, W]`, with a ridge, from their lower triangle.

    The ridge is added in place and taken away again: of large layers, a copy would need gigabytes.

    Args:
        products (`Tensor`): float64 `[W, W]`.
        strength (`float`): Ridge strength, relative to the mean square of an activation.
        constants (`int`): The first regressors are constants, for a bias, to which no ridge is added.

    Returns:
        The factor, and the ridge on each regressor, `[W, 1]`.
    """
    diagonal = products.diagonal()
    before, ridge = diagonal.clone(), torch.zeros_like(diagonal)
    ridge[constants:] = strength * diagonal[constants:].mean().clamp_min(1e-30)
    diagonal.add_(ridge)
    factor = torch.linalg.cholesky(products)
    diagonal.copy_(before)
    return factor, ridge[:, None]


def add_products(products: Tensor, inner: Tensor, weighted: Tensor) -> None:
    """Add `inner^T weighted` to `products`, where `weighted` is `inner` times a weight of each token.

    The sum is symmetric, so only one of its triangles is computed, in blocks of rows: of large layers, these products
    take most of the time of a fit.

    Args:
        products (`Tensor`): `[W, W]`, symmetric; changed in place.
        inner (`Tensor`): Activations, `[T, W]`.
        weighted (`Tensor`): `[T, W]`.
    """
    size = max(_LEAST_BLOCK, -(-len(products) // _BLOCKS))
    for start in range(0, len(products), size):
        rows = slice(start, start + size)
        products[rows, start:].addmm_(inner[:, rows].T, weighted[:, start:])
        products[start + size :, rows] = products[rows, start + size :].T
