"""The forms that a sparse layer may take: how many experts stay, how many dense neurons there are, and their sizes."""

from __future__ import annotations

import torch
from torch import nn

from ...blocks import SparseBlock
from ...model.layers_cdmoe import CondensedMLP

# At most this share of all experts' neurons becomes dense: more would cost time, and hardly lower the error.
_DENSE_SHARE = 3 / 8
# At most so many neurons, and so many different widths. Least squares chooses from twice as many, with the square of
# that in memory.
MOST_NEURONS = 2**13
_MOST_WIDTHS = 24
# Kernels like widths that are multiples of these.
_STEPS = (128, 64, 32, 16, 8, 4, 2, 1)


def width_step(block: SparseBlock) -> int:
    """Return the step between widths: the largest of 128, 64, ... that divides the width of an expert."""
    return next(step for step in _STEPS if block.intermediate_size % step == 0)


def dense_widths(block: SparseBlock, routed: int, most: int | None = None) -> list[int]:
    """List the numbers of dense neurons that a layer may have, ascending.

    Args:
        block (`SparseBlock`): The sparse block.
        routed (`int`): Number of experts that stay.
        most (`int`, *optional*): Largest number; by default 3/8 of all experts' neurons.
    """
    step = width_step(block)
    if most is None:
        most = int(block.num_experts * _DENSE_SHARE) * block.intermediate_size
    most = min(most, (block.num_experts - routed) * block.intermediate_size, MOST_NEURONS)
    stride = step * max(1, -(-most // (step * _MOST_WIDTHS)))
    return list(range(0, most + 1, stride))


def block_parameters(block: SparseBlock) -> int:
    """Count the parameters of a sparse block, with all parts of the decoder layer that belong to it."""
    return _count(*block.modules)


def condensed_parameters(block: SparseBlock) -> tuple[int, int]:
    """Count the parameters of a condensed layer without dense neurons, and of one such neuron."""
    norm = 0 if block.norm is None else _count(block.norm)
    sizes = [_count(_layer(block, width)) + norm for width in (0, 1)]
    return sizes[0], sizes[1] - sizes[0]


def empty_layer(block: SparseBlock, width: int) -> CondensedMLP:
    """Make the condensed layer with a number of dense neurons, whose weights are still to be set."""
    mlp = _layer(block, width).to(block.dtype).to_empty(device=block.device)
    block.complete(mlp)
    return mlp.train(block.module.training)


def _layer(block: SparseBlock, width: int) -> CondensedMLP:
    biased = block.expert_weights().biased or any(piece.weights.biased for piece in block.pieces([0], [1.0]))
    with torch.device("meta"):
        spec = block.condensed_spec(block.shared_intermediate_size + width, biased)
        return CondensedMLP(block.hidden_size, spec)


def _count(*modules: nn.Module) -> int:
    own = {id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}
    return sum(own.values())
