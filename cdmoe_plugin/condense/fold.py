"""Folding of a sparse block's kept experts and shared expert into one dense MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blocks import DensePiece, SparseBlock
from ..model.layers_cdmoe import CondensedMLP


class TokenGates(NamedTuple):
    """Gates per token for K experts, `sigmoid(weight @ x + bias)`, which scale what the experts add with constant ones.

    Args:
        weight (`Tensor`): `[K, H]`.
        bias (`Tensor`): `[K]`.
        mean (`Tensor`): Mean of each gate over tokens, `[K]`, for the experts' output biases, which no neuron carries.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor


@torch.no_grad()
def fold(
    block: SparseBlock,
    experts: Sequence[int],
    gates: Sequence[float],
    neurons: Sequence[Tensor] | None = None,
    token_gates: TokenGates | None = None,
) -> CondensedMLP:
    """Fold a sparse block into one dense MLP of width `I_s + K * I`, in the block's dtype and on its device.

    Gates (and the block's constant factors) are folded into the down projection in float32 and rounded once.

    Args:
        block (`SparseBlock`): The sparse block; it is not changed.
        experts (`Sequence[int]`): The K kept routed experts.
        gates (`Sequence[float]`): Their constant gates.
        neurons (`Sequence[Tensor]`, *optional*): As in `SparseBlock.pieces`: only some neurons of each expert, which
            have its gate. The width is then that of the shared expert and these.
        token_gates (`TokenGates`, *optional*): Further gates of the experts, which make the layer more than a plain
            MLP.

    Raises:
        UnsupportedModelError: if the block's shared expert can't be part of a dense MLP.
    """
    pieces = block.pieces(experts, gates, neurons)
    routed = slice(len(pieces) - len(experts), None)
    gated = [] if token_gates is None else [len(piece.weights.up) for piece in pieces[routed]]
    width = sum(len(piece.weights.up) for piece in pieces)
    bias = block.expert_weights().biased or any(piece.weights.biased for piece in pieces)
    if token_gates is not None:
        pieces[routed] = map(_with_mean_bias, pieces[routed], token_gates.mean.tolist())
    mlp = _filled(block, block.condensed_spec(width, bias, gated), pieces, block.output_bias())
    if mlp.expert_gates is not None and token_gates is not None:
        mlp.expert_gates.weight.copy_(token_gates.weight)
        mlp.expert_gates.bias.copy_(token_gates.bias)
    block.complete(mlp)
    return mlp.train(block.module.training)


@torch.no_grad()
def fold_beside(
    block: SparseBlock, experts: Sequence[int], gates: Sequence[float], neurons: Sequence[Tensor] | None = None
) -> CondensedMLP:
    """Fold the shared expert and some routed ones into the dense part of a block that keeps experts and its router.

    In place of the shared expert, its output is still multiplied by the block's factor for it and its gate per token,
    and the block's own bias or norm follows.

    Args:
        block, experts, gates, neurons: As for `fold`.
    """
    pieces = block.pieces(experts, gates, neurons)
    pieces = [DensePiece(piece.weights, piece.factor / block.shared_scale) for piece in pieces]
    bias = any(piece.weights.biased for piece in pieces)
    width = sum(len(piece.weights.up) for piece in pieces)
    mlp = _filled(block, block.beside_spec(width, bias), pieces, None)
    return mlp.train(block.module.training)


def _filled(
    block: SparseBlock, spec: Mapping[str, Any], pieces: Sequence[DensePiece], output_bias: Tensor | None
) -> CondensedMLP:
    """Make an MLP with the weights of pieces."""
    with torch.device("meta"):
        mlp = CondensedMLP(block.hidden_size, spec)
    mlp = mlp.to(block.dtype).to_empty(device=block.device)
    start = 0
    for weights, factor in pieces:
        rows = slice(start, start := start + len(weights.up))
        if mlp.gate_proj is not None:
            mlp.gate_proj.weight[rows] = weights.gate
        mlp.up_proj.weight[rows] = weights.up
        mlp.down_proj.weight[:, rows] = (weights.down.float() * factor).to(block.dtype)
    if mlp.down_proj.bias is not None:
        _fold_biases(mlp, pieces, output_bias)
    return mlp


def _with_mean_bias(piece: DensePiece, mean: float) -> DensePiece:
    """Multiply the output bias of a piece, if any, by the mean of its gate."""
    bias = piece.weights.down_bias
    return piece if bias is None else piece._replace(weights=piece.weights._replace(down_bias=bias * mean))


def _fold_biases(mlp: CondensedMLP, pieces: Sequence[DensePiece], output_bias: Tensor | None) -> None:
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
