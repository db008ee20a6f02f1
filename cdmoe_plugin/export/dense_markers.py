"""The ways in which configs of transformers mark decoder layers as dense.

None of this is trusted: `stock_config` builds the model from the edited config and compares it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

ANY, EXPERTS = "any layers", "layers of experts"
# Spacing of the sparse layers of llama4, beside the list of them.
STEP = "interleave_moe_layer_step"


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

    @property
    def marks_any(self) -> bool:
        """Whether every set of sparse layers can be marked."""
        return self.possible in (ANY, EXPERTS)


def _by_list(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    kinds = config.mlp_layer_types
    if len(kinds) != total:
        return None
    fields: dict[str, Any] = {"mlp_layer_types": ["dense" if i in dense else kind for i, kind in enumerate(kinds)]}
    # Some configs, or the files that they were read from, also have these fields, for other readers.
    flags = [int(i not in dense) for i in range(total)]
    fields |= {name: flags for name, value in vars(config).items() if "moe" in name and _are_flags(value, total)}
    prefix = _by_prefix("first_k_dense_replace").update(config, dense, total)
    return fields | prefix if prefix and hasattr(config, "first_k_dense_replace") else fields


def _are_flags(value: Any, total: int) -> bool:
    """Return whether a field marks each layer as sparse (1) or dense (0), as `moe_layer_freq` of some architectures."""
    return isinstance(value, list) and len(value) == total and all(flag in (0, 1) for flag in value)


def _by_block_type(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    # Each layer of a hybrid has one kind: attention, state space, experts, or a dense MLP.
    kinds = config.layers_block_type
    if any(kinds[i] not in ("moe", "mlp") for i in dense):
        return None
    return {"layers_block_type": ["mlp" if i in dense else kind for i, kind in enumerate(kinds)]}


def _by_indices(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    return {"mlp_only_layers": sorted(dense)}


def _by_sparse_indices(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    fields: dict[str, Any] = {"moe_layers": [i for i in range(total) if i not in dense]}
    # transformers ignores the step beside the list; other readers know only the step, and 0 as no sparse layer.
    step = next((n for n in range(total + 1) if dense == dense_by_step(n, total)), None)
    return fields if step is None or not hasattr(config, STEP) else fields | {STEP: step}


def dense_by_step(step: int, total: int) -> set[int]:
    """Return the dense layers if every `step`-th one is sparse; all of them for 0."""
    return {layer for layer in range(total) if not step or (layer + 1) % step}


def _by_prefix(name: str) -> Marker:
    def update(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
        return {name: len(dense)} if dense == set(range(len(dense))) else None

    return Marker((name,), "the first layers", update)


def _by_prefix_and_period(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    sparse = sorted(set(range(total)) - dense)
    if not sparse:
        return {"first_k_dense_replace": total, "moe_layer_freq": 1}
    for period in range(1, total + 1):
        if sparse == [i for i in range(sparse[0], total) if i % period == 0]:
            return {"first_k_dense_replace": max(0, sparse[0] - period + 1), "moe_layer_freq": period}
    return None


def _by_range(config: Any, dense: Set[int], total: int) -> dict[str, Any] | None:
    names = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
    if len(dense) == total:  # the range begins after the last layer; llama.cpp knows no other interval than 1
        return dict(zip(names, (total, total, 1), strict=True))
    sparse = sorted(set(range(total)) - dense)
    for period in range(1, total + 1):
        if sparse == [i for i in range(sparse[0], sparse[-1] + 1) if (i + 1) % period == 0]:
            start, end = max(0, sparse[0] - period + 1), min(total - 1, sparse[-1] + period - 1)
            return dict(zip(names, (start, end, period), strict=True)) if end > 0 else None
    return None


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
    Marker(("mlp_layer_types",), ANY, _by_list),
    Marker(("layers_block_type",), EXPERTS, _by_block_type),
    Marker(("mlp_only_layers",), ANY, _by_indices),
    Marker(("moe_layers",), ANY, _by_sparse_indices),
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


def markers_of(config: Any) -> list[Marker]:
    """List the ways in which a config marks dense layers."""
    return [marker for marker in MARKERS if all(hasattr(config, name) for name in marker.fields)]
