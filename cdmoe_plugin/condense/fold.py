"""Folding of a sparse block's kept experts and shared expert into one dense MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blocks import DensePiece, SparseBlock
from ..model.layers_cdmoe import CondensedMLP


@torch.no_grad()
def fold(block: SparseBlock, experts: Sequence[int], gates: Sequence[float]) -> CondensedMLP:
    """Fold a sparse block into one dense MLP of width `I_s + K * I`, in the block's dtype and on its device.

    Gates (and the block's constant factors) are folded into the down projection in float32 and rounded once.

    Args:
        block (`SparseBlock`): The sparse block; it is not changed.
        experts (`Sequence[int]`): The K kept routed experts.
        gates (`Sequence[float]`): Their constant gates.

    Raises:
        UnsupportedModelError: if the block's shared expert can't be part of a dense MLP.
    """
    pieces = block.pieces(experts, gates)
    width = sum(len(piece.weights.up) for piece in pieces)
    bias = block.expert_weights().biased or any(piece.weights.biased for piece in pieces)
    with torch.device("meta"):
        mlp = CondensedMLP.from_spec(block.hidden_size, block.condensed_spec(width, bias))
    mlp = mlp.to(block.dtype).to_empty(device=block.device)
    start = 0
    for weights, factor in pieces:
        rows = slice(start, start := start + len(weights.up))
        if mlp.gate_proj is not None:
            mlp.gate_proj.weight[rows] = weights.gate
        mlp.up_proj.weight[rows] = weights.up
        mlp.down_proj.weight[:, rows] = (weights.down.float() * factor).to(block.dtype)
    if mlp.down_proj.bias is not None:
        _fold_biases(mlp, pieces, block.output_bias())
    block.complete(mlp)
    return mlp.train(block.module.training)


def _fold_biases(mlp: CondensedMLP, pieces: Sequence[DensePiece], output_bias: torch.Tensor | None) -> None:
    """Copy the biases of all neurons, and sum those of the down projections with their gates and factors."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        if projection is not None and projection.bias is not None:
            projection.bias.zero_()
    total = torch.zeros_like(mlp.down_proj.bias, dtype=torch.float32)
    if output_bias is not None:
        total += output_bias.float()
    start = 0
    for weights, factor in pieces:
        rows = slice(start, start := start + len(weights.up))
        for linear, bias in ((mlp.gate_proj, weights.gate_bias), (mlp.up_proj, weights.up_bias)):
            if linear is not None and bias is not None:
                linear.bias[rows] = bias
        if weights.down_bias is not None:
            total += weights.down_bias.float() * factor
    mlp.down_proj.bias.copy_(total)
