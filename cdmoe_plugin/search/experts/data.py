"""What expert selection looks at in a sparse layer, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...blocks import SparseBlock
from ...decoder.record import LayerCall
from ..processes import Processes


@dataclass
class SparseLayerData:
    """Everything that expert selection may look at in one sparse layer.

    Args:
        block (`SparseBlock`): The sparse block.
        calls (`list[LayerCall]`): The layer on this process's calibration batches.
        gates (`Tensor`): float64 `[N]`, the constant gates; NaN for an expert that is no candidate.
        metric (`Callable`): Divergence per token of two outputs, from `registry.METRICS`.
        cache_bytes (`int`): Memory for expert outputs that are kept between rounds.
        seed (`int`): Seed of every random choice.
        processes (`Processes`): Who has the other batches; sums go over all of them.
    """

    block: SparseBlock
    calls: list[LayerCall]
    gates: Tensor
    metric: Callable[[Tensor, Tensor], Tensor]
    cache_bytes: int
    seed: int = 0
    processes: Processes = field(default_factory=Processes)

    @property
    def candidates(self) -> list[int]:
        """Experts that at least one token chose."""
        return [int(i) for i in torch.nonzero(~self.gates.isnan()).flatten()]

    @property
    def factors(self) -> Tensor:
        """Factors of `expert_outputs` in a condensed layer, float64 `[N]`; NaN for an expert that is no candidate."""
        return self.block.output_factors(self.gates)

    def expert_outputs(self, x: Tensor, experts: Sequence[int] | None = None) -> Tensor:
        """Outputs `[N, T, H]` of routed experts (all by default) for `x` `[T, H]`, to be multiplied by `factors`."""
        return self.block.expert_outputs(x, experts, self.gates if experts is None else self.gates[list(experts)])


@dataclass(frozen=True)
class ExpertOrder:
    """The experts of one layer in the order of their selection.

    Args:
        experts (`list[int]`): The kept experts.
        scores (`list[float]`): Divergence of the layer's output with none of them, with the first, with the first two,
            ...: the same quantity for every method, also where the order comes from something else.
        steps (`list[dict[int, float]]`): Divergence of every candidate in every round; empty where the method has no
            rounds.
    """

    experts: list[int]
    scores: list[float]
    steps: list[dict[int, float]] = field(default_factory=list)
