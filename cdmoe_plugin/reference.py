"""The search results published by the paper's authors (github.com/duterscmy/CD-MoE, folder cd-moe/data)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .atomic import read_json
from .checks import is_int


def read_reference(
    expert_weights: str | os.PathLike | Mapping[str, Sequence[float]],
    expert_order: str | os.PathLike | Mapping[str, Sequence[int]],
    layer_order: str | os.PathLike | Sequence[int],
    first_sparse_layer: int = 1,
) -> list[dict[str, Any]]:
    """Read the authors' three files (paths or parsed contents) as the condensed layers of a plan.

    The files number the sparse layers from 0; plans number the decoder layers.

    Args:
        expert_weights: `dynamic_weight.json`: "layer-expert" to [sum of gates, tokens, mean gate].
        expert_order: `layer_idx_to_expert_idx.greedy_jl.json`: layer to its experts in the order of selection.
        layer_order: `layer_idx_order.e6.json` or `layer_idx_order.e0.json`: layers in the order of selection.
        first_sparse_layer (`int`, defaults to 1): Decoder layer index of their layer 0 (DeepSeekMoE-16B: 1).

    Returns:
        `list[dict]`: Decoder layer, experts, gates and tokens per expert of each condensed layer, in the order of their
            selection.

    Raises:
        ValueError: naming the layer or expert, if a file has another format or lacks one that another file names.
    """
    weights = _read(expert_weights, dict, "expert_weights")
    experts = _read(expert_order, dict, "expert_order")
    order = _read(layer_order, list, "layer_order")
    rows = []
    for index in order:
        if not is_int(index):
            raise ValueError(f"`layer_order` should list layers by their numbers, but has layer {index!r}.")
        chosen = experts.get(str(index))
        if not isinstance(chosen, list):
            raise ValueError(f"`expert_order` has no list of experts for layer {index!r} of `layer_order`.")
        entries = [_entry(weights, index, expert) for expert in chosen]
        gates, tokens = [float(mean) for _, _, mean in entries], [count for _, count, _ in entries]
        rows.append({"layer": index + first_sparse_layer, "experts": chosen, "gates": gates, "tokens": tokens})
    return rows


def _read(source: Any, kind: type, name: str) -> Any:
    values = read_json(source) if isinstance(source, (str, os.PathLike)) else source
    if isinstance(values, Mapping):
        values = dict(values)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        values = list(values)
    if not isinstance(values, kind):
        raise ValueError(f"`{name}` should hold a {kind.__name__}, but holds a {type(values).__name__}.")
    return values


def _entry(weights: Mapping[str, Any], layer: int, expert: int) -> Sequence[Any]:
    entry = weights.get(f"{layer}-{expert}")
    if not isinstance(entry, Sequence) or len(entry) != 3:
        raise ValueError(
            f"`expert_weights` has no [sum, tokens, mean] for expert {expert} of layer {layer}: no token chose it, so "
            "it has no gate and can't be kept."
        )
    if not isinstance(entry[2], (int, float)) or isinstance(entry[2], bool):
        raise ValueError(f"`expert_weights` has {entry[2]!r} as mean gate of expert {expert} of layer {layer}.")
    return entry
