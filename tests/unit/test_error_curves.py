"""Error curves against ridge regressions that are solved one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdmoe_plugin.condense.refit.ridge import STRENGTHS
from cdmoe_plugin.search.spread.errors import Sums, fits_along


def sums(a: Tensor, y: Tensor, w: Tensor) -> Sums:
    return Sums(a.T @ (w[:, None] * a), a.T @ (w[:, None] * y), (w * y.square().sum(1)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_errors_along_an_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    columns, weights = draw(50, 4) @ draw(4, 9) + 0.2 * draw(50, 9), draw(50).square() + 0.1
    prior, target = draw(9, 3), columns @ draw(9, 3) + draw(50, 3)
    order, numbers = torch.tensor([4, 0, 7, 2, 8]), [0, 1, 3, 5]
    fit, held_out = (sums(columns[rows], target[rows], weights[rows]) for rows in (slice(30), slice(30, 50)))
    found = fits_along(order, numbers, fit, held_out, prior)
    scale = (weights[:30, None] * columns[:30, order].square()).sum(0).mean()
    for number, error in zip(numbers, found.errors, strict=True):
        own, start = columns[:, order[:number]], prior[order[:number]]
        left = weights.sqrt()[:, None] * (target - own @ start)
        best = left[30:].square().sum()
        for strength in STRENGTHS:
            # Ridge regression as further rows, for the change of the prior.
            rows = torch.cat([weights[:30].sqrt()[:, None] * own[:30], (strength * scale).sqrt() * torch.eye(number)])
            change = torch.linalg.lstsq(rows, torch.cat([left[:30], torch.zeros(number, 3)]), driver="gelsd").solution
            best = min(best, (left[30:] - weights[30:].sqrt()[:, None] * (own[30:] @ change)).square().sum())
        assert error == pytest.approx(float(best), rel=1e-6)
    last = target[30:] - columns[30:, order] @ found.last
    assert float((weights[30:] * last.square().sum(1)).sum()) == pytest.approx(found.errors[-1], rel=1e-9)
