"""The ways in which configs of transformers mark decoder layers as dense.

None of this is trusted: `stock_config` builds the model from the edited config and compares it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Marker:
    """One way in which a config marks dense layers.

    Args:
        fields (`tuple[str, ...]`): The config fields. A config must have all of them.
        possible (`str`): The sets of layers that can be marked, for messages.
        update (`Callable`): From config, dense layers and number of all layers to the fields that change; None if these
            layers can't be marked.
    """

    fields: tuple[str, ...]
    possible: str
    update: Callable[[Any, Set[int], int], dict[str, Any] | None]


def _by_list(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    kinds = config.mlp_layer_types
    if len(kinds) != total:
        return None
    fields = {"mlp_layer_types": ["dense" if i in dense else kind for i, kind in enumerate(kinds)]}
    # Some configs also have this field, for other readers.
    prefix = _by_prefix("first_k_dense_replace").update(config, dense, total)
    return fields | prefix if prefix and hasattr(config, "first_k_dense_replace") else fields


def _by_block_type(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    # Each layer of a hybrid has one kind: attention, state space, experts, or a dense MLP.
    kinds = config.layers_block_type
    if any(kinds[i] not in ("moe", "mlp") for i in dense):
        return None
    return {"layers_block_type": ["mlp" if i in dense else kind for i, kind in enumerate(kinds)]}


def _by_indices(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    return {"mlp_only_layers": sorted(dense)}


def _by_sparse_indices(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    return {"moe_layers": [i for i in range(total) if i not in dense]}


def _by_prefix(name: str) -> Marker:
    def update(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
        return {name: len(dense)} if dense == set(range(len(dense))) else None

    return Marker((name,), "the first layers", update)


def _by_prefix_and_period(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    for period in range(1, total + 1):
        for start in range(total + 1):
            if dense == {i for i in range(total) if i < start or i % period}:
                return {"first_k_dense_replace": start, "moe_layer_freq": period}
    return None


def _by_range(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    for period in range(1, total + 1):
        for start in range(total + 1):
            for end in range(total - 1, max(start, 1) - 1, -1):
                if dense == {i for i in range(total) if not start <= i <= end or (i + 1) % period}:
                    names = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
                    return dict(zip(names, (start, end, period), strict=True))
    # Without a sparse layer, the range begins after the last layer.
    return {"moe_layer_start_index": total, "moe_layer_end_index": total} if len(dense) == total else None


def _by_period(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    if len(dense) == total:
        return {"num_experts": 1}
    for period in range(1, total + 1):
        for offset in range(period):
            if dense == {i for i in range(total) if i % period != offset}:
                return {"expert_layer_period": period, "expert_layer_offset": offset}
    return None


def _by_no_experts(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    return {"num_local_experts": 0} if len(dense) == total else None


MARKERS = (
    Marker(("mlp_layer_types",), "any layers", _by_list),
    Marker(("layers_block_type",), "layers of experts", _by_block_type),
    Marker(("mlp_only_layers",), "any layers", _by_indices),
    Marker(("moe_layers",), "any layers", _by_sparse_indices),
    Marker(
        ("first_k_dense_replace", "moe_layer_freq"),
        "the first layers, and all but every n-th of the others,",
        _by_prefix_and_period,
    ),
    _by_prefix("first_k_dense_replace"),
    _by_prefix("num_dense_layers"),
    Marker(
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        "the first and the last layers, and all but every n-th of the others,",
        _by_range,
    ),
    Marker(("expert_layer_period", "expert_layer_offset"), "all layers, or all but every n-th,", _by_period),
    Marker(("num_local_experts", "shared_intermediate_size"), "all layers", _by_no_experts),
)
