"""The inputs, the sum of experts and the routing of a sparse block, recorded as its decoder layer runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .dispatch import Routing


class BlockRecord:
    """What passed through a sparse block in one call.

    Args:
        scale (`float`): The constant that the block multiplies its routed sum with.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._input: Any = None
        self._output: Any = None
        self._routing: Routing | None = None  # of T tokens in a row
        self._sum: Tensor | None = None  # of shared and routed experts, where that is not the block's output
        self._summands: list[Tensor] = []  # what the decoder layer adds to the block's output

    @property
    def complete(self) -> bool:
        """Whether the block has run."""
        return self._output is not None

    def note_block(self, block_input: Tensor, output: Tensor) -> None:
        """Record the call of the block."""
        self._input, self._output = block_input, output

    def note_routing(self, routing: Routing) -> None:
        """Record the routing; weights then include the block's own scale."""
        self._routing = Routing(routing.experts, routing.weights.float() * self.scale)

    def note_sum(self, total: Tensor) -> None:
        """Record the sum of experts where the block makes something else of it."""
        self._sum = total

    def note_summand(self, output: Tensor) -> None:
        """Record a part of the sum that the decoder layer adds outside the block."""
        self._summands.append(output)

    def inputs(self, valid: Tensor) -> Tensor:
        """The inputs of the block at the tokens of a mask `[B, S]`: `[T, H]`."""
        return self._input.view(*valid.shape, -1)[valid]

    def total(self, valid: Tensor) -> Tensor:
        """The sum of shared and routed experts, float32 `[B, S, H]`; some blocks see all tokens in one row."""
        total = (self._output if self._sum is None else self._sum).view(*valid.shape, -1).float()
        for summand in self._summands:
            total = total + summand.float()
        return total

    @property
    def routing(self) -> Routing:
        """The routing of all tokens, `[B * S, k]`."""
        assert self._routing is not None  # the probe of the block has seen such a call before
        return self._routing

    def routing_at(self, valid: Tensor) -> Routing:
        """The routing of the T tokens of a mask `[B, S]`."""
        return Routing(*(part.view(*valid.shape, -1)[valid] for part in self.routing))
