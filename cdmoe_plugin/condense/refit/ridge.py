"""The refit of the down projection in closed form: ridge regression towards the folded one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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

    With inner activations `a` `[T, W]`, residuals `r = y - a D^T` `[T, H]` and token weights `w`, the sums are
    `a^T w a` `[W, W]`, `a^T w r` `[W, H]`, `sum w r²` and `sum w y²`, in float64. Memory does not grow with T. With
    products in float32, which many GPUs compute faster, rounding exceeds the smaller ridges, and solving fails.
    """

    def __init__(self, mlp: CondensedMLP) -> None:
        self.mlp = mlp
        bias = mlp.down_proj.bias
        self.weight = mlp.down_proj.weight.double()
        self.bias = None if bias is None else bias.double()
        width, hidden_size = mlp.intermediate_size, mlp.hidden_size
        self.products = self.weight.new_zeros(width, width)
        self.rest = self.weight.new_zeros(width, hidden_size)
        self.error = self.weight.new_zeros(())
        self.size = self.weight.new_zeros(())

    def add(self, example: Example) -> None:
        """Add some tokens to the sums."""
        for part in example.split(self.mlp.intermediate_size):
            inner = inner_activations(self.mlp, part.inputs).double()
            weights = part.weights.double()[:, None]
            left = part.target.double() - F.linear(inner, self.weight, self.bias)
            add_products(self.products, inner, inner * weights)
            self.rest.addmm_(inner.T, left * weights)
            self.error += (left.square() * weights).sum()
            self.size += (part.target.double().square() * weights).sum()

    def solve(self, strength: float) -> Tensor:
        """Solve the ridge regression for the change of the transposed down projection, `[W, H]`."""
        ridge = strength * self.products.diagonal().mean().clamp_min(1e-30)
        factor = ridge_factor(self.products, ridge)
        half = torch.linalg.solve_triangular(factor, self.rest, upper=False)  # unlike cholesky_solve, without a copy
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)

    def error_with(self, change: Tensor) -> float:
        """Compute `sum w r²` after a change of the transposed down projection."""
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
    """Fit the down projection of a layer to its target by ridge regression, in closed form.

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
    errors = {strength: held_out.error_with(fit.solve(strength)) for strength in STRENGTHS if mlp.intermediate_size}
    before, size = float(held_out.error), max(float(held_out.size), 1e-30)
    strength = min(errors, key=lambda s: errors[s], default=None)
    if strength is None or not errors[strength] < before:
        return RefitLayer(before / size, before / size)
    fit += held_out
    weight = mlp.down_proj.weight
    weight.copy_((weight.double() + fit.solve(strength).T).to(weight.dtype))
    return RefitLayer(before / size, errors[strength] / size, strength)


def inner_activations(mlp: CondensedMLP, x: Tensor) -> Tensor:
    """Compute the input of a condensed MLP's down projection, `[T, W]` in the dtype of `x`."""
    with patched_forward(mlp.down_proj, lambda inner: inner):
        return mlp.sum_of_experts(x)


def ridge_factor(products: Tensor, ridge: Tensor) -> Tensor:
    """Compute the Cholesky factor of `products + ridge I`, `[W, W]`, from the lower triangle of the products.

    The ridge is added in place and taken away again: of large layers, a copy would need gigabytes.
    """
    diagonal = products.diagonal().clone()
    products.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(products)
    products.diagonal().copy_(diagonal)
    return factor


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
