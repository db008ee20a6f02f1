"""The forms of a layer in which some experts stay behind the router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...blocks import RoutedPart, SparseBlock, UnsupportedModelError
from ...condense.fold import fold_beside
from ...condense.mixed import MixedLayer
from ...model.layers_cdmoe import CondensedMLP
from .forms import block_parameters, dense_widths
from .measure import Family

# Experts that stay come in steps of so many parts of all.
_PARTS = 8


def mixed_forms(block: SparseBlock, order: Sequence[int]) -> list[Family]:
    """List the forms of a layer that keeps some of its experts; none if its router does not allow that.

    Args:
        block (`SparseBlock`): Its sparse block.
        order (`Sequence[int]`): Its experts in the order in which they stay.
    """
    families = []
    for number in numbers_that_stay(block):
        stay, widths = sorted(order[:number]), dense_widths(block, number)
        routed = StayingExperts(block, stay)
        parameters, bare = (mixed_parameters(block, number, dense) for dense in (True, False))
        if bare < parameters:  # without dense neurons, there is no bias of a dense part either
            families.append(Family(stay, [0], bare, routed, dense=False))
            widths = widths[1:]
        if widths:
            families.append(Family(stay, widths, parameters, routed))
    return families


def numbers_that_stay(block: SparseBlock) -> list[int]:
    """List the numbers of experts that may stay, ascending: about the eighths of all, as the router allows."""
    if not block.follows_inputs:  # the router sees other inputs than the experts
        return []
    try:
        part = RoutedPart(block)
    except UnsupportedModelError:
        return []
    groups = part.groups[0]
    numbers = {round(block.num_experts * i / _PARTS / groups) * groups for i in range(1, _PARTS)}
    return sorted(number for number in numbers if number < block.num_experts and part.allows(number))


def groups_of(block: SparseBlock) -> int:
    """Return the number of groups of a block's router; 1 if it can't lose experts."""
    try:
        return RoutedPart(block).groups[0]
    except UnsupportedModelError:
        return 1


def mixed_parameters(block: SparseBlock, number: int, dense: bool = True) -> int:
    """Count the parameters of a layer that keeps so many experts, without dense neurons beside the shared expert.

    Args:
        block (`SparseBlock`): The sparse block.
        number (`int`): Number of experts that stay.
        dense (`bool`, defaults to `True`): Whether there will be dense neurons, which bring a bias in some models.
    """
    places, saved = block.places(None), 0
    for name in RoutedPart(block).sliced:
        place, _, rest = name.partition(".")
        owner, _, own = rest.rpartition(".")
        tensor = getattr(places[place].get_submodule(owner), own)
        if isinstance(tensor, nn.Parameter):
            saved += tensor.numel() // block.num_experts * (block.num_experts - number)
    parameters = block_parameters(block) - saved
    if block.shared is None and not dense:
        return parameters
    biased = any(piece.weights.biased for piece in block.pieces([0], [1.0]))
    with torch.device("meta"):
        mlp = CondensedMLP(block.hidden_size, block.beside_spec(block.shared_intermediate_size, biased))
    shared = 0 if block.shared is None else sum(p.numel() for p in block.shared.parameters())
    return parameters + sum(p.numel() for p in mlp.parameters()) - shared


class StayingExperts:
    """The experts of a layer that stay behind the router, which no longer sees the others.

    Args:
        block (`SparseBlock`): The sparse block; it is not changed.
        stay (`Sequence[int]`): These experts, in ascending order.
    """

    def __init__(self, block: SparseBlock, stay: Sequence[int]) -> None:
        self.block = block
        self.stay = stay

    def __call__(self, x: Tensor) -> Tensor:
        """Compute their output for inputs `[T, H]`, with that of a bias of the block, float32 `[T, H]`."""
        # Copies of the experts of all forms would need more memory than the layer; copying is cheap beside the rest.
        shared = None if self.block.shared is None else fold_beside(self.block, [], [])
        return MixedLayer(self.block, self.stay, shared).routed_output(x)

    @torch.no_grad()
    def gate(self, x: Tensor) -> Tensor | None:
        """Compute the factor of all dense neurons, the gate of the shared expert, `[T, 1]`; None without one."""
        gate = self.block.shared_gate
        return None if gate is None else torch.sigmoid(gate(x).float())
