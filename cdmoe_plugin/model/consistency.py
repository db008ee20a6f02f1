"""A condensed checkpoint's layers, held against the plan and the base config in the same config.json.

Weights have the shapes that the layers describe, or are refused. But how many neurons belong to the shared expert, and
through which activation they go, shows in no shape: such an edit would open as another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..plan import CondensedLayer, CondensePlan
from ..shapes import SparseLayerShape


def check_layers(config: PreTrainedConfig) -> None:
    """Check that `condense_config.condensed_layers` of a config agrees with its plan and with its activation.

    Layers or plans that can't be understood are left to those who read them.

    Raises:
        ValueError: naming the layer and the field, what it is and what it should be.
    """
    condense_config: Any = getattr(config, "condense_config", None)
    specs = condense_config.get("condensed_layers") if isinstance(condense_config, Mapping) else None
    if not isinstance(specs, Mapping):
        return
    activations = _activations(config)
    for layer, spec in specs.items():
        spec = (spec.get("dense") or spec) if isinstance(spec, Mapping) else spec
        if isinstance(spec, Mapping) and activations and spec.get("hidden_act", activations[0]) not in activations:
            _refuse(layer, "hidden_act", spec["hidden_act"], " or ".join(map(repr, activations)))
    try:
        plan = CondensePlan.from_dict(condense_config.get("plan"))
    except ValueError:
        return
    planned = {str(layer.layer): layer for layer in plan.layers}
    if specs.keys() != planned.keys():
        raise ValueError(
            f"`condense_config.condensed_layers` names the decoder layers {sorted(specs)}, but its plan condenses "
            f"{sorted(planned)}: config.json was edited or belongs to another checkpoint."
        )
    rows = {} if plan.model is None else {str(row.layer): row for row in plan.model.sparse_layers}
    chosen = condense_config.get("neurons")
    for layer, spec in specs.items():
        if isinstance(spec, Mapping) and layer in rows:
            dense = spec.get("dense")
            whole = {**dense, **spec} if isinstance(dense, Mapping) else spec
            expected = _planned(plan.form, planned[layer], rows[layer])
            if spec.get("gated_neurons"):
                own = chosen.get(layer) if isinstance(chosen, Mapping) else None
                experts = [rows[layer].intermediate_size] * len(planned[layer].experts)
                expected["gated_neurons"] = list(own.values()) if isinstance(own, Mapping) else experts
            for field, value in expected.items():
                if whole.get(field, "condense" if field == "form" else None) != value:
                    _refuse(layer, field, whole.get(field), repr(value))
    if rows and condense_config.get("all_condensed") not in (None, specs.keys() == rows.keys()):
        raise ValueError(
            f"`condense_config.all_condensed` is {condense_config['all_condensed']!r}, but {len(specs)} of "
            f"{len(rows)} sparse layers are condensed: config.json was edited."
        )


def _planned(form: str, layer: CondensedLayer, row: SparseLayerShape) -> dict[str, Any]:
    if form.startswith("trim"):
        return {"form": form}
    shared = row.shared_intermediate_size
    beside = layer.dense_neurons(row.intermediate_size)
    sizes = {"shared_intermediate_size": shared, "intermediate_size": shared + beside}
    if layer.routed is None:
        return {"form": form, **sizes}
    numbers = {"form": "mixed", "num_experts": row.num_experts, "num_routed": len(layer.routed)}
    return numbers | sizes if shared + beside else numbers


def _activations(config: PreTrainedConfig) -> list[str]:
    """List the values of a config's fields for activations (`hidden_act`, `mlp_hidden_act`, ...)."""
    fields = vars(config.get_text_config())
    return [value for name, value in fields.items() if isinstance(value, str) and "_act" in name]


def _refuse(layer: str, field: str, found: Any, expected: str) -> None:
    raise ValueError(
        f"`condense_config.condensed_layers` has `{field}` {found!r} for decoder layer {layer}, but by the plan and "
        f"the base config beside it, it should be {expected}: config.json was edited or belongs to another checkpoint."
    )
