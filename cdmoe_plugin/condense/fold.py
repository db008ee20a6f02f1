"""Fold the kept experts of a sparse block, and its shared expert, into one dense MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..blocks import GatedWeights, SparseBlock, UnsupportedModelError
from ..model.layers_cdmoe import CondensedMLP
from ..offload import in_memory_copy


@torch.no_grad()
def fold(block: SparseBlock, experts: Sequence[int], gates: Sequence[float]) -> CondensedMLP:
    """The condensed form of a sparse block: one dense MLP of width `I_s + K * I`, in the block's dtype and place.

    Gates (and the block's constant factors) are folded into the down projection, or into gate and up projection where
    they multiply the experts' inputs, in float32 and rounded once; so are the maps around experts in a latent space.

    Args:
        block (`SparseBlock`): The sparse block; it is not changed.
        experts (`Sequence[int]`): The kept routed experts, K of them.
        gates (`Sequence[float]`): Their constant gates.
    """
    shared = block.shared_weights()
    routed = block.expert_weights()
    parts = [] if shared is None else [(shared, block.shared_scale)]
    for index, gate in zip(experts, gates, strict=True):
        expert = block.expert(index)
        parts.append((expert.of_scaled_inputs(gate), 1.0) if block.gates_inputs else (expert, gate))
    bias = routed.biased or any(weights.biased for weights, _ in parts)
    output_bias = block.output_bias()
    if shared is not None and shared.biased and block.shared_gate is not None:
        raise UnsupportedModelError("A shared expert with both biases and a gate per token can't be condensed.")
    width = block.shared_intermediate_size + len(experts) * block.intermediate_size
    with torch.device("meta"):
        mlp = CondensedMLP(
            block.hidden_size,
            width,
            block.hidden_act,
            shared_intermediate_size=block.shared_intermediate_size,
            shared_expert_gate=block.shared_gate is not None,
            bias=bias,
            output_bias=output_bias is not None,
            gated_activation=block.activation,
            shared_gated_activation=other_activation(block),
            returns_tuple=block.returns_tuple,
        )
    mlp = mlp.to(block.dtype).to_empty(device=block.device)
    start = 0
    for weights, factor in parts:
        rows = slice(start, start := start + weights.gate.shape[0])
        if mlp.gate_proj is not None:
            mlp.gate_proj.weight[rows] = weights.gate
        mlp.up_proj.weight[rows] = weights.up
        mlp.down_proj.weight[:, rows] = (weights.down.float() * factor).to(block.dtype)
    if mlp.down_proj.bias is not None:
        _fold_biases(mlp, parts, output_bias)
    if mlp.shared_expert_gate is not None and block.shared_gate is not None:
        mlp.shared_expert_gate.weight.copy_(block.shared_gate.weight)
    if block.norm_name is not None and block.norm is not None:
        mlp.keep_norm(block.norm_name, in_memory_copy(block.norm))
    return mlp.train(block.module.training)


def _fold_biases(
    mlp: CondensedMLP, parts: Sequence[tuple[GatedWeights, float]], output_bias: torch.Tensor | None
) -> None:
    """Each neuron keeps its biases; those of the down projections are added, gates and factors included."""
    for projection in (mlp.gate_proj, mlp.up_proj):
        if projection is not None and projection.bias is not None:
            projection.bias.zero_()
    total = torch.zeros_like(mlp.down_proj.bias, dtype=torch.float32)
    if output_bias is not None:
        total += output_bias.float()
    start = 0
    for weights, factor in parts:
        rows = slice(start, start := start + weights.gate.shape[0])
        for linear, bias in ((mlp.gate_proj, weights.gate_bias), (mlp.up_proj, weights.up_bias)):
            if linear is not None and bias is not None:
                linear.bias[rows] = bias
        if weights.down_bias is not None:
            total += weights.down_bias.float() * factor
    mlp.down_proj.bias.copy_(total)


def other_activation(block: SparseBlock) -> dict[str, Any] | None:
    """The shared expert's gated activation where it is another one than the routed experts'."""
    if block.shared is None or block.shared_activation == block.activation:
        return None
    return block.shared_activation or {"form": "plain"}
