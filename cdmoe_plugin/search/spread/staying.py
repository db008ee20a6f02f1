"""The order in which experts stay behind the router of a layer, in a search for a size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ...blocks import Routing
from ...condense.refit import LayerExamples
from ...condense.refit.neurons import NeuronPool
from ...config import CondenseConfig
from ...registry import ROUTED_SELECTIONS
from ..staying import staying_order
from .mixed import groups_of
from .search import StayOrder


class _Call(NamedTuple):
    inputs: Tensor
    routing: Routing


class RoutedExamples:
    """The examples of a layer as methods of `routed_selection` read them, with one batch in memory at a time.

    Args:
        examples (`LayerExamples`): The layer on all calibration batches.
        counts (`Tensor`): How many tokens of all processes chose each expert, float64 `[N]`.
    """

    def __init__(self, examples: LayerExamples, counts: Tensor) -> None:
        self.examples = examples
        self.counts = counts
        self.block = examples.block
        self.processes = examples.processes

    @property
    def calls(self) -> Iterator[_Call]:
        """The layer's inputs and its router's choices, batch by batch."""
        for batch in range(len(self.examples)):
            inputs, experts, weights = self.examples.routed(batch)
            yield _Call(inputs, Routing(experts, weights))

    def choice_counts(self) -> Tensor:
        """Return how many tokens chose each expert, float64 `[N]`."""
        return self.counts.cpu()


def stay_order(config: CondenseConfig) -> StayOrder:
    """Return the order in which a config's `routed_selection` lets the experts of a layer stay, in each group alike."""
    select = ROUTED_SELECTIONS.of(config)

    def order(examples: LayerExamples, pool: NeuronPool) -> list[int]:
        return staying_order(select(RoutedExamples(examples, pool.counts)), groups_of(examples.block))

    return order
