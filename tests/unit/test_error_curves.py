"""Error curves against ridge regressions that are solved one by one, and the memory of fits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdmoe_plugin.condense.refit.neurons import forward_least_squares
from cdmoe_plugin.condense.refit.ridge import STRENGTHS, NormalEquations
from cdmoe_plugin.condense.refit.sums import Sums
from cdmoe_plugin.model.layers_cdmoe import CondensedMLP
from cdmoe_plugin.search.spread.errors import fits_along
from tests.helpers.peak import peak_memory


def sums(a: Tensor, y: Tensor, w: Tensor) -> Sums:
    return Sums(a.T @ (w[:, None] * a), a.T @ (w[:, None] * y), (w * y.square().sum(1)).sum())


@pytest.mark.parametrize("constants", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_errors_along_an_order(seed: int, constants: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    columns, weights = draw(50, 4) @ draw(4, 9) + 0.2 * draw(50, 9), draw(50).square() + 0.1
    prior, target = draw(9, 3), columns @ draw(9, 3) + draw(50, 3)
    order, numbers = torch.tensor([4, 0, 7, 2, 8]), [constants, 1 + constants, 3, 5]
    columns[:, 4] = 1.0
    fit, held_out = (sums(columns[rows], target[rows], weights[rows]) for rows in (slice(30), slice(30, 50)))
    fit, held_out = fit.of(order), held_out.of(order)
    found = fits_along(numbers, fit, held_out, prior[order], constants)
    scale = (weights[:30, None] * columns[:30, order[constants:]].square()).sum(0).mean()
    for number, error in zip(numbers, found.errors, strict=True):
        own, start = columns[:, order[:number]], prior[order[:number]]
        left = weights.sqrt()[:, None] * (target - own @ start)
        best = torch.inf if constants else left[30:].square().sum()
        for strength in STRENGTHS:
            # Ridge regression as further rows, for the change of the prior.
            ridge = (strength * scale).sqrt() * torch.eye(number)
            ridge[:constants] = 0
            rows = torch.cat([weights[:30].sqrt()[:, None] * own[:30], ridge])
            change = torch.linalg.lstsq(rows, torch.cat([left[:30], torch.zeros(number, 3)]), driver="gelsd").solution
            best = min(best, (left[30:] - weights[30:].sqrt()[:, None] * (own[30:] @ change)).square().sum())
        assert error == pytest.approx(float(best), rel=1e-6)
    last = target[30:] - columns[30:, order] @ found.last
    assert float((weights[30:] * last.square().sum(1)).sum()) == pytest.approx(found.errors[-1], rel=1e-9)


def test_products_of_large_layers_are_in_memory_once() -> None:
    """With n regressors: a fit needs n² numbers beside the sums, and the choice of regressors nothing like that."""
    n, matrix = 600, 8 * 600**2
    columns = torch.randn(2 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = sums(columns, columns[:, :4].clone(), torch.ones(2 * n, dtype=torch.float64))
    numbers, prior = list(range(0, n + 1, 50)), torch.zeros(n, 4, dtype=torch.float64)
    assert matrix < peak_memory(lambda: fits_along(numbers, both, both, prior)) < 1.6 * matrix
    no_shared = {"shared_intermediate_size": 0, "shared_expert_gate": False, "bias": False}
    equations = NormalEquations(CondensedMLP(4, {"intermediate_size": n, "hidden_act": "silu"} | no_shared))
    equations.products.copy_(both.products)
    assert matrix < peak_memory(lambda: equations.solve(1e-3)) < 1.1 * matrix
    choose = lambda: forward_least_squares(both.products, both.with_target, 100, 250)  # noqa: E731
    assert peak_memory(choose) < 0.8 * matrix
