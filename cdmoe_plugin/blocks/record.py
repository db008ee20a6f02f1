"""The inputs, sum of experts and routing of a sparse block, recorded while its decoder layer runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .dispatch import Routing


class BlockRecord:
    """The record of one call of a sparse block.

    Args:
        scale (`float`): The constant by which the block multiplies its routed sum.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._input: Any = None
        self._output: Any = None
        self._routing: Routing | None = None  # of all tokens, flattened
        self._sum: Tensor | None = None  # of shared and routed experts, if it is not the block's output
        self._summands: list[Tensor] = []  # added to the block's output by the decoder layer

    @property
    def complete(self) -> bool:
        """Whether the block has run."""
        return self._output is not None

    def note_block(self, block_input: Tensor, output: Tensor) -> None:
        """Record the call of the block."""
        self._input, self._output = block_input, output

    def note_routing(self, routing: Routing) -> None:
        """Record the routing, with the block's own scale in the weights."""
        self._routing = Routing(routing.experts, routing.weights.float() * self.scale)

    def note_sum(self, total: Tensor) -> None:
        """Record the sum of experts, if it is not the block's output."""
        self._sum = total

    def note_summand(self, output: Tensor) -> None:
        """Record a part of the sum that the decoder layer adds outside the block."""
        self._summands.append(output)

    def inputs(self, valid: Tensor) -> Tensor:
        """Return the inputs of the block at the T tokens of a mask `[B, S]`: `[T, H]`."""
        return self._input.view(*valid.shape, -1)[valid]

    def total(self, valid: Tensor) -> Tensor:
        """Return the sum of shared and routed experts, float32 `[B, S, H]`, also if the block flattens its tokens."""
        total = (self._output if self._sum is None else self._sum).view(*valid.shape, -1).float()
        for summand in self._summands:
            total = total + summand.float()
        return total

    @property
    def routing(self) -> Routing:
        """The routing of all tokens, `[B * S, k]`."""
        assert self._routing is not None  # the probe has checked it
        return self._routing

    def routing_at(self, valid: Tensor) -> Routing:
        """Return the routing of the T tokens of a mask `[B, S]`."""
        return Routing(*(part.view(*valid.shape, -1)[valid] for part in self.routing))
