"""Inner products of expert outputs, from which squared errors and volumes follow: N² values instead of N·T·H."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...decoder.tails import AffineTail, as_it_is
from ...metrics.mse import mean_squared_error
from .data import SparseLayerData

# Elements of the outputs of all experts for some tokens, and of their float64 copies for a few of these tokens: small
# enough for a CPU's cache, and large enough for a GPU.
_OUTPUT_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
_WIDE_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


@torch.no_grad()
def gram_matrix(
    data: SparseLayerData, token_weights: Sequence[Tensor] | None = None, with_rest: bool = False
) -> Tensor:
    """Compute the inner products of the experts' gated outputs, weighted over the calibration tokens: float64 `[N, N]`.

    Rows and columns of experts that are not candidates are NaN.

    Args:
        data (`SparseLayerData`): The sparse layer.
        token_weights (`list[Tensor]`, *optional*): `[T]` per call; by default those of the divergences.
        with_rest (`bool`): Whether to add a row and a column (`[N + 1, N + 1]`) for the rest: the sparse block's output
            without the shared expert.
    """
    device, num = data.block.device, data.block.num_experts
    parts = []
    width = num * data.block.hidden_size
    size, step = (
        max(1, elements.get(device.type, elements["cpu"]) // width) for elements in (_OUTPUT_ELEMENTS, _WIDE_ELEMENTS)
    )
    wide = torch.empty(num + with_rest, step, data.block.hidden_size, dtype=torch.float64, device=device)
    for i, call in enumerate(data.calls):
        weights = call.token_weights if token_weights is None else token_weights[i]
        gram = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=device)
        pieces = (call.inputs, call.target, weights.double().sqrt())
        for inputs, target, roots in zip(*(piece.split(size) for piece in pieces), strict=True):
            outputs = data.expert_outputs(inputs)
            rest = target - data.block.shared_output(inputs) if with_rest else target
            for start in range(0, len(inputs), step):
                rows = slice(start, start + step)
                part = wide[:, : len(inputs[rows])]
                torch.mul(outputs[:, rows], roots[rows, None], out=part[:num])
                if with_rest:
                    torch.mul(rest[rows], roots[rows, None], out=part[num])
                flat = part.flatten(1)
                gram.addmm_(flat, flat.T)
        parts.append(gram)
    gates = torch.cat([data.factors, data.gates.new_ones(int(with_rest))])
    return data.processes.total(parts).cpu() * gates[:, None] * gates


class SquaredErrors:
    """The mean squared errors of `comparison.LayerComparison`, from inner products alone.

    With the block's output without the shared expert r and `v_i = g_i E_i(x)`, the error of a set S of experts is
    `‖r - sum_S v_i‖² = ‖r‖² - 2 sum_S <r, v_i> + sum_SS <v_i, v_j>`, so rounds need no tokens.

    Args:
        gram (`Tensor`): float64 `[N + 1, N + 1]`, inner products of the `v_i` and, last, r.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram[:-1, :-1]
        self.left = gram[:-1, -1].clone()  # <r - sum of the kept v_j, v_i>
        self.error = float(gram[-1, -1])

    @classmethod
    def of(cls, data: SparseLayerData) -> SquaredErrors | None:
        """Make the errors of a layer, or return None: if the metric or the layer is another one, or not finite."""
        if data.metric is not mean_squared_error:
            return None
        scaled = []
        for call in data.calls:
            if not isinstance(call.tail, AffineTail) or call.tail.finish is not as_it_is:
                return None
            scaled.append(call.token_weights.double() * (call.tail.slope**2 / data.block.hidden_size))
        gram = gram_matrix(data, scaled, with_rest=True)
        rows = [*data.candidates, -1]
        return cls(gram) if bool(torch.isfinite(gram[rows][:, rows]).all()) else None

    def keep(self, expert: int) -> None:
        """Add an expert to the kept ones."""
        self.error = self.with_each()[expert]
        self.left -= self.gram[:, expert]

    def without(self) -> float:
        """Return the error with the shared expert alone. Call it before `keep`."""
        return self.error

    def with_each(self) -> list[float]:
        """Compute the error with each expert of the layer added to the kept ones; NaN for non-candidates."""
        # Rounding may make it slightly negative.
        return (self.error - 2 * self.left + self.gram.diagonal()).clamp_min(0).tolist()
