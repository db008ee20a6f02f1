"""The input and output of expert selection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...blocks import Routing, SparseBlock
from ...decoder.record import LayerCall
from ...processes import Processes


class RoutedCall(Protocol):
    """A sparse block on one batch: its inputs, `[T, H]` in the model's dtype, and its router's choice for them."""

    @property
    def inputs(self) -> Tensor: ...

    @property
    def routing(self) -> Routing: ...


class RoutedData(Protocol):
    """The part of a layer's data that is needed to choose the experts that stay behind its router."""

    @property
    def block(self) -> SparseBlock:
        """The sparse block."""

    @property
    def calls(self) -> Iterable[RoutedCall]:
        """The block on this process's calibration batches."""

    @property
    def processes(self) -> Processes:
        """All processes of the search."""

    def choice_counts(self) -> Tensor:
        """Count the calibration tokens of all processes that chose each expert, float64 `[N]`."""


@dataclass
class SparseLayerData:
    """The data for expert selection in one sparse layer.

    Args:
        block (`SparseBlock`): The sparse block.
        calls (`list[LayerCall]`): The layer on this process's calibration batches.
        gates (`Tensor`): The constant gates, float64 `[N]`; NaN for experts that are not candidates.
        metric (`Callable`): Divergence per token of two outputs, from `registry.METRICS`.
        cache_bytes (`int`): Memory for expert outputs that are kept between rounds.
        seed (`int`): Seed of every random choice.
        processes (`Processes`): All processes of the search. Sums are over the batches of all of them.
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
        """The experts that were chosen by at least one token."""
        return [int(i) for i in torch.nonzero(~self.gates.isnan()).flatten()]

    def choice_counts(self) -> Tensor:
        """Count the calibration tokens of all processes that chose each expert, float64 `[N]`."""
        number = self.block.num_experts
        counts = [torch.bincount(call.routing.experts.flatten().cpu(), minlength=number) for call in self.calls]
        return self.processes.total(counts).cpu()

    @property
    def factors(self) -> Tensor:
        """The factors of `expert_outputs` in a condensed layer, float64 `[N]`; NaN for non-candidates."""
        return self.block.output_factors(self.gates)

    def expert_outputs(self, x: Tensor, experts: Sequence[int] | None = None) -> Tensor:
        """Compute outputs `[N, T, H]` of routed experts (all by default) for `x` `[T, H]`, without their `factors`."""
        return self.block.expert_outputs(x, experts, self.gates if experts is None else self.gates[list(experts)])


@dataclass(frozen=True)
class ExpertOrder:
    """The experts of one layer in the order of their selection.

    Args:
        experts (`list[int]`): The kept experts.
        scores (`list[float]`): Divergence of the layer's output with none of them, with the first, with the first two,
            ... The same quantity for every method, even if it ranks experts by another one.
        steps (`list[dict[int, float]]`): Divergence of every candidate in every round; empty for methods without
            rounds.
        tokens (`list[int]`, *optional*): How many calibration tokens chose each kept expert; methods leave it to the
            search.
        routed (`list[int]`, *optional*): The experts that stay behind the router, also left to the search.
    """

    experts: list[int]
    scores: list[float]
    steps: list[dict[int, float]] = field(default_factory=list)
    tokens: list[int] | None = None
    routed: list[int] | None = None
